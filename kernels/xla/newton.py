r"""The limit of Sinkhorn's iteration, by Newton's method on its dual.

The doubly stochastic matrix that is closest to exp(L) in relative entropy is

    P_ij = exp(L_ij + u_i + v_j),   P 1 = 1,   P^T 1 = 1.

Rows are normalised at once, so n - 1 unknowns v are left (one is free), in
which the dual is convex, with gradient 1 - c and Hessian

    diag(c) - P^T P,   c the column sums: the Laplacian of the graph P^T P.

(Newton on this dual: Wang and Qiu, arXiv 2606.07574, for 4 x 4.) A step here is
a column step of Sinkhorn's and then Newton's, v <- v + s d with
s = log(1 + |d|) / |d|, so that no entry moves by more than Newton trusts. The
first half of the steps work on tau L, with tau rising from 1/8 to 1: from cold,
logits far apart would cost a step for each unit between them.

What Newton loses where P is nearly a permutation is the digits of 1 - c and of
the Laplacian, both small differences of numbers near 1. They are formed here
from the small entries alone: with m the row in which column j is largest,

    1 - c_j = sum_{k != j} P_mk - sum_{i != m} P_ij,

the Laplacian is given by its weights P^T P off the diagonal, and eliminated
without a subtraction. At tau = 1 the matrix itself is rescaled, not the logits,
whose last bits are larger than what is left to be done.

Where no projection exists, the zeros of exp(L) leaving no permutation, rows
still sum to one and columns do not: `manifold.residuals` tells. Where it is a
limit alone, as I is of a triangle, the result nears it.

Matrices are [n, n, t], vectors [n, t].
"""

import functools

import jax
import jax.numpy as jnp

from mhc import axes

COLDEST = 1 / 8  # the first tau


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def newton(logits, num_steps):
  """[n, n, t] float32 -> the projected matrices; keeps the result only.

  The gradient is that of the limit, by the implicit function theorem. Reverse
  mode only.
  """
  return _project(logits, num_steps)


def _newton_forward(logits, num_steps):
  out = _project(logits, num_steps)
  return out, out


def _newton_backward(num_steps, p, g):
  r"""dL = P * (G - a 1^T - 1 b^T), rows and columns of which sum to zero.

  (diag(c) - P^T P) b = r with r_j = sum_ik P_ij P_ik (G_ij - G_ik), and a
  leaves dL_ij = P_ij sum_k P_ik (E_ij - E_ik), E = G - 1 b^T.
  """
  del num_steps
  b = _solve(_weights(p), jnp.sum(p * _differences(p, g), axis=0))
  return (p * _differences(p, g - b[None]),)


newton.defvjp(_newton_forward, _newton_backward)


def _project(logits, num_steps):
  cold = num_steps // 2
  ratio = COLDEST ** (-1 / max(1, cold))

  def at_rising_tau(step, v):
    tau = COLDEST * ratio ** jnp.asarray(step, jnp.float32)
    v = v * ratio
    scaled = tau * logits
    p = jax.nn.softmax(scaled + v[None], axis=1)
    v = v - jnp.log1p(-_missing(p))
    return v + _direction(jax.nn.softmax(scaled + v[None], axis=1))

  v = jnp.zeros_like(logits[0])
  v = axes.cast_varying(v, axes.varying_axes(logits))
  v = jax.lax.fori_loop(0, cold, at_rising_tau, v)
  p = jax.nn.softmax(logits + (v * ratio)[None], axis=1)
  return jax.lax.fori_loop(0, num_steps - cold, lambda _, p: _rescaled(p), p)


def _rescaled(p):
  """P after a column step and a Newton step at tau = 1."""
  p = _normalised(p / (1 - _missing(p))[None])
  return _normalised(p * jnp.exp(_direction(p))[None])


def _direction(p):
  """Newton's step for v, damped."""
  d = _solve(_weights(p), _missing(p))
  size = jnp.max(jnp.abs(d), axis=0, keepdims=True)
  # log(1 + x) / x, which is 1 - x / 2 where it cannot be divided.
  small = size < 1e-4
  damping = jnp.log1p(size) / jnp.where(small, 1, size)
  return d * jnp.where(small, 1 - size / 2, damping)


def _normalised(p):
  return p / jnp.sum(p, axis=1, keepdims=True)


def _missing(p):
  """1 - c, column by column, from the entries that are not near 1."""
  n = len(p)
  index = jnp.arange(n)
  largest = (index[:, None, None] == jnp.argmax(p, axis=0)[None]).astype(
    p.dtype
  )
  others = (index[:, None] != index[None]).astype(p.dtype)
  rest = jnp.sum(p[:, :, None] * others[None, ..., None], axis=1)
  return jnp.sum(largest * rest - (1 - largest) * p, axis=0)


def _weights(p):
  """P^T P; what is on the diagonal is not used."""
  return jnp.sum(p[:, :, None] * p[:, None], axis=0)


def _differences(p, g):
  """sum_k P_ik (G_ij - G_ik)."""
  return jnp.sum(p[:, None] * (g[:, :, None] - g[:, None]), axis=2)


def _solve(weights, right):
  """x of Laplacian x = right, [n, t], with x_0 = 0.

  The Laplacian has -weights off the diagonal and rows that sum to zero. Nodes
  are eliminated from the last on: their weights go to their neighbours, and no
  difference is ever formed. A node without neighbours has nothing to solve.
  """
  n, eliminated = len(right), []
  for node in range(n - 1, 0, -1):
    row, value = weights[node, :node], right[node]
    total = jnp.sum(row, axis=0)
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    share = row * inverse[None]
    eliminated.append((share, value * inverse))
    weights = weights[:node, :node] + share[:, None] * row[None]
    right = right[:node] + share * value[None]
  x = [0 * right[0]]
  for share, own in reversed(eliminated):
    x.append(own + jnp.sum(share * jnp.stack(x), axis=0))
  return jnp.stack(x)
