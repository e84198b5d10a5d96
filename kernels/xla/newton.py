r"""The limit of Sinkhorn's iteration, by Newton's method on its dual.

The doubly stochastic matrix that is closest to exp(L) in relative entropy is

    P_ij = exp(L_ij + u_i + v_j),   P 1 = 1,   P^T 1 = 1.

Rows are normalised at once, so n - 1 unknowns v are left (one is free), in
which the dual is convex,

    D(v) = sum_i log sum_j exp(L_ij + v_j) - sum_j v_j,

with gradient c - 1 and Hessian diag(c) - P^T P, c the column sums: the
Laplacian of the graph P^T P. (Newton on this dual: Wang and Qiu, arXiv
2606.07574, for 4 x 4.) A step here is a column step of Sinkhorn's, and then
that one of these, after which D is least:

*   Newton's for c = 1. Of two parts of the streams that give each other a and
    b, it moves one by s = (b - a) / (b + a), never more than 1, where
    1/2 log(b / a) is needed: many steps for a far one. Also damped, to the
    logarithm of its size.
*   The same, bent: artanh(s) is what is needed. The elimination that solves the
    system meets such an s at every node, that of the part that the node stands
    for by then, and each is bent.
*   Newton's for the logarithms. With m the row in which column j is largest,
    c_j = 1 says that the row gives away what the column gets from others,

        out_j = sum_{k != j} P_mk  =  in_j = sum_{i != m} P_ij,

    and log out_j = log in_j is nearly linear in v where P is nearly a
    permutation: one step takes any distance. Where no entry of a column exceeds
    1/2, the equation is log c_j = 0. Also twice.

The first half of the steps work on tau L, with tau rising from 1/8 to 1.

Digits are lost where P is nearly a permutation, since 1 - c and the Laplacian
are small differences of numbers near 1. They are never formed: 1 - c is
out - in, both systems are given by their weights off the diagonal (their rows
sum to zero) and eliminated without a subtraction. What a sum of both signs
leaves within its rounding error moves nothing far: streams that mix with each
other alone would be thrown about by noise. At tau = 1 the matrix itself is
rescaled, not the logits, whose last bits are larger than what is left to do.

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
# Parts that are further apart wait for the next step.
FARTHEST = 1 - 1e-6


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
  right = jnp.sum(p * _differences(p, g), axis=0)
  # Without terms nothing is taken for noise: b counts times small entries only.
  eliminated = _eliminate(_weights(p, p), right, jnp.zeros_like(right))
  b = _substitute(eliminated)
  return (p * _differences(p, g - b[None]),)


newton.defvjp(_newton_forward, _newton_backward)


def _project(logits, num_steps):
  cold = num_steps // 2
  ratio = COLDEST ** (-1 / max(1, cold))

  def at_rising_tau(step, v):
    tau = COLDEST * ratio ** jnp.asarray(step, jnp.float32)
    v = v * ratio
    return v + _step(_normalised(tau * logits + v[None]))

  def at_one(_, log_p):
    return _normalised(log_p + _step(log_p)[None])

  v = jnp.zeros_like(logits[0])
  v = axes.cast_varying(v, axes.varying_axes(logits))
  v = jax.lax.fori_loop(0, cold, at_rising_tau, v)
  log_p = _normalised(logits + (v * ratio)[None])
  p = jnp.exp(jax.lax.fori_loop(0, num_steps - cold, at_one, log_p))
  return p / jnp.sum(p, axis=1, keepdims=True)


def _step(log_p):
  """What to add to v: a column step of Sinkhorn's and the best of Newton's."""
  column = -_finite(jax.nn.logsumexp(log_p, axis=0))
  log_p = _normalised(log_p + column[None])
  far, near, bent = _newton_steps(log_p)
  size = jnp.max(jnp.abs(near), axis=0, keepdims=True)
  damped = near * (jnp.log1p(size) / jnp.where(size > 0, size, 1))
  # A tie within the rounding error of D is the first one's.
  best = far
  least = _dual(log_p, far) - 8 * jnp.finfo(far.dtype).eps
  for step in (2 * far, near, damped, bent):
    value = _dual(log_p, step)
    best = jnp.where((value < least)[None], step, best)
    least = jnp.minimum(value, least)
  return column + best


def _dual(log_p, step):
  """D after a step, less D before it.

  With k_i the column that leads in row i, step_k is taken out of row i: where
  P is nearly a permutation, large steps cancel before they are rounded.
  """
  columns = jnp.arange(len(step))[None, :, None]
  leads = (columns == jnp.argmax(log_p, axis=1)[:, None]).astype(step.dtype)
  taken_out = jnp.sum(leads * step[None], axis=1, keepdims=True)
  rows = jax.nn.logsumexp(log_p + (step[None] - taken_out), axis=1)
  excess = jnp.sum(leads, axis=0) - 1
  return jnp.sum(rows, axis=0) + jnp.sum(excess * step, axis=0)


def _newton_steps(log_p):
  """Newton's steps: for the logarithms, for the sums, and the latter bent."""
  p = jnp.exp(log_p)
  index = jnp.arange(len(p))
  same = (index[:, None] == index[None])[..., None]
  first = index[:, None, None] == jnp.argmax(p, axis=0)[None]  # i = m_j
  # log P_mk of each column j, [j, k, t].
  row = jnp.sum(jnp.where(first[:, :, None], log_p[:, None], 0), axis=0)
  others = jnp.where(first, -jnp.inf, log_p)
  log_out = jax.nn.logsumexp(jnp.where(same, -jnp.inf, row), axis=1)
  log_in = jax.nn.logsumexp(others, axis=0)
  flows = jnp.exp(log_out), jnp.exp(log_in)
  log_out, log_in = _finite(log_out), _finite(log_in)
  log_c = _finite(jax.nn.logsumexp(log_p, axis=0))
  largest = jnp.max(p, axis=0)
  leads = largest > 0.5

  entries = jnp.where(leads[None], others - log_in[None], log_p - log_c[None])
  given = jnp.where(leads, largest, 0)[:, None] * jnp.exp(
    row - log_out[:, None]
  )
  weights = _weights(jnp.exp(entries), p) + given
  right = jnp.where(leads, log_out - log_in, -log_c)
  terms = jnp.where(leads, jnp.abs(log_out) + jnp.abs(log_in), jnp.abs(log_c))
  of_logarithms = _substitute(_eliminate(weights, right, 1 + terms))

  right = jnp.where(leads, flows[0] - flows[1], -jnp.expm1(log_c))
  terms = jnp.where(leads, flows[0] + flows[1], 1)
  of_sums = _eliminate(_weights(p, p), right, terms)
  bent = [(share, _bend(value)) for share, value in of_sums]
  return of_logarithms, _substitute(of_sums), _substitute(bent)


def _bend(value):
  return jnp.arctanh(jnp.clip(value, -FARTHEST, FARTHEST))


def _normalised(log_p):
  return log_p - jax.nn.logsumexp(log_p, axis=1, keepdims=True)


def _finite(x):
  """x, with 0 for what is not finite: logarithms of nothing."""
  return jnp.where(jnp.isfinite(x), x, 0)


def _weights(a, b):
  """A^T B; what is on the diagonal is not used."""
  return jnp.sum(a[:, :, None] * b[:, None], axis=0)


def _differences(p, g):
  """sum_k P_ik (G_ij - G_ik)."""
  return jnp.sum(p[:, None] * (g[:, :, None] - g[:, None]), axis=2)


def _eliminate(weights, right, terms):
  """The nodes of M x = right, [n, t], x_0 = 0, for `_substitute`.

  M has -weights off the diagonal and rows that sum to zero. Nodes are
  eliminated from the last on: their weights go to their neighbours, and no
  difference of weights is ever formed. `terms` are the sizes of what `right`
  was summed from: a right side within their rounding error that would move x
  by more than 1 is zero. A node without neighbours has nothing to solve.

  Returns:
    of each node, from the last on, the shares of those before it and its own
    value: x = value + sum_k share_k x_k.
  """
  eliminated = []
  noise = jnp.finfo(right.dtype).eps
  for node in range(len(right) - 1, 0, -1):
    row, column = weights[node, :node], weights[:node, node]
    total = jnp.sum(row, axis=0)
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    share = row * inverse[None]
    value = right[node] * inverse
    noisy = jnp.abs(right[node]) <= noise * terms[node]
    # Once: a sum that cancels is another one where a fusion adds it up again.
    value = jax.lax.optimization_barrier(
      jnp.where(noisy & (jnp.abs(value) > 1), 0, value)
    )
    eliminated.append((share, value))
    weights = weights[:node, :node] + column[:, None] * share[None]
    right = right[:node] + column * value[None]
    terms = terms[:node] + column * (terms[node] * inverse)[None]
  return [*eliminated, (weights[0, :0], jnp.zeros_like(right[0]))]


def _substitute(eliminated):
  """x, [n, t], from the first node on."""
  first, *others = reversed(eliminated)
  x = [first[1]]
  for share, value in others:
    x.append(value + jnp.sum(share * jnp.stack(x), axis=0))
  return jnp.stack(x)
