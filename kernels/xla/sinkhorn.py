r"""Sinkhorn's iteration in plain JAX: by its divisors, with three gradients.

Every iterate is a rescaling of one fixed kernel,

    M_ij = K_ij / (r_i c_j),

so an iteration only updates two vectors of divisors,

    c_j <- sum_i K_ij / r_i + eps c_j          (columns),
    r_i <- sum_j K_ij / c_j + eps r_i          (rows),

instead of n^2 entries. For eps = 0 the kernel is exp(L) shifted by its column
maxima and then by its row maxima; the first shift cancels in the first column
step, the second is undone by the starting value of r. Each row and each column
of K then holds a one, so no sum underflows, whatever the logits.

The adjoint walks back in D, the gradient in log M. A row step M = X / (X 1 +
eps) takes it from D_M = M * G to

    D_X = D_M - M * (D_M 1),

and a column step likewise with column sums, so that it needs only the iterates,
and each step removes the rounding of the one before.

Matrices are [n, n, ...] and divisors [n, ...]: everything is elementwise in the
dimensions behind, so that the same lines run on [n, n, t] under XLA and on one
block of tokens in a TPU kernel (`mhc.kernels.pallas.sinkhorn`).

`sinkhorn`, `unrolled` and `implicit` are the three gradients that
`mhc.sinkhorn_project` describes; the first is the one that kernels have.
"""

import functools

import jax
import jax.numpy as jnp

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(logits, num_iters, eps):
  """[n, n, t] float32 -> the projected matrices; keeps the logits only."""
  return _project(logits, num_iters, eps)


def _sinkhorn_forward(logits, num_iters, eps):
  return _project(logits, num_iters, eps), logits


def _sinkhorn_backward(num_iters, eps, logits, g):
  """The adjoint of the truncated iteration, walked back step by step."""
  kernel, rows0, last, history = divisors(num_iters, eps, logits)

  def iterate(carry, before):
    grad, (rows, columns) = carry
    grad = row_adjoint(kernel, grad, rows, columns)
    grad = column_adjoint(kernel, grad, before[0], columns)
    return (grad, before), None

  carry = (g * scale(kernel, *last), last)
  carry, _ = jax.lax.scan(iterate, carry, history, reverse=True)
  grad, (rows, columns) = carry
  grad = row_adjoint(kernel, grad, rows, columns)
  return (start_adjoint(eps, kernel, grad, rows0, columns),)


sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


def unrolled(logits, num_iters, eps):
  """`sinkhorn` by its definition, entry by entry, for autodiff."""
  matrix = jax.nn.log_softmax(logits, axis=0)
  if eps:
    matrix = jnp.exp(matrix) + eps
    matrix = matrix / (jnp.sum(matrix, axis=1, keepdims=True) + eps)
  else:
    matrix = jax.nn.softmax(matrix, axis=1)

  def iterate(matrix, _):
    matrix = matrix / (jnp.sum(matrix, axis=0, keepdims=True) + eps)
    matrix = matrix / (jnp.sum(matrix, axis=1, keepdims=True) + eps)
    return matrix, None

  matrix, _ = jax.lax.scan(iterate, matrix, length=num_iters - 1)
  return matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def implicit(logits, num_iters, eps):
  """`sinkhorn` with the gradient of its limit; keeps the result only."""
  return _project(logits, num_iters, eps)


def _implicit_forward(logits, num_iters, eps):
  out = _project(logits, num_iters, eps)
  return out, out


def _implicit_backward(num_iters, eps, out, g):
  r"""Gradient at the fixed point P = diag(u) K diag(v).

  dL = P * (G - a 1^T - 1 b^T) with a, b chosen so that dL has zero row and
  column sums. With D the column sums of P (1 in the limit),

      a + P b = rowsum(P * G),   P^T a + D b = colsum(P * G),
      (D - P^T P) b = colsum(P * G) - P^T rowsum(P * G).

  D - P^T P is positive semi-definite because P's rows sum to one. Its null
  space holds 1, and more for reducible P, where the right-hand side vanishes:
  11^T/n and a small ridge make it definite and keep the solution bounded.
  """
  del num_iters, eps
  size = out.shape[0]
  p = jnp.moveaxis(out, -1, 0)
  weighted = p * jnp.moveaxis(g, -1, 0)
  row_sums = jnp.sum(weighted, axis=2)[..., None]
  column_sums = jnp.sum(weighted, axis=1)[..., None]
  transposed = jnp.swapaxes(p, 1, 2)
  eye = jnp.eye(size)[None]
  system = eye * jnp.sum(p, axis=1)[..., None] - _matmul(transposed, p)
  system = system + 1e-6 * eye + 1 / size
  b = jnp.linalg.solve(system, column_sums - _matmul(transposed, row_sums))
  a = row_sums - _matmul(p, b)
  grad = weighted - p * (a + jnp.swapaxes(b, 1, 2))
  return (jnp.moveaxis(grad, 0, -1),)


implicit.defvjp(_implicit_forward, _implicit_backward)


def _project(logits, num_iters, eps):
  kernel, _, last, _ = divisors(num_iters, eps, logits)
  return scale(kernel, *last)


def start(eps, logits):
  """(K, r, c) after the first column step; r is where rows start from."""
  shifted = logits - jnp.max(logits, axis=0, keepdims=True)
  if eps:
    kernel = jnp.exp(shifted)
    kernel = kernel / jnp.sum(kernel, axis=0, keepdims=True) + eps
    ones = kernel[0] * 0 + 1  # not jnp.ones: varies over mesh axes as K does
    return kernel, ones, ones
  row_max = jnp.max(shifted, axis=1)
  kernel = jnp.exp(shifted - row_max[:, None])
  columns = column_sums(kernel, jnp.exp(row_max))
  return kernel, jnp.exp(-row_max), columns


def divisors(num_iters, eps, logits):
  """Kernel, starting divisors and the divisors after each iteration."""
  kernel, rows, columns = start(eps, logits)
  last, history = jax.lax.scan(
    lambda carry, _: (iteration(eps, kernel, *carry), carry),
    (row_step(eps, kernel, rows, columns), columns),
    length=num_iters - 1,
  )
  return kernel, rows, last, history


def row_step(eps, kernel, rows, columns):
  """The row divisors that make the rows of K / c sum to one."""
  return _step(eps, row_sums(kernel, 1 / columns), rows)


def iteration(eps, kernel, rows, columns):
  """The divisors (r, c) after one iteration, columns first."""
  columns = _step(eps, column_sums(kernel, 1 / rows), columns)
  return row_step(eps, kernel, rows, columns), columns


def _step(eps, sums, divisors):
  return sums + eps * divisors if eps else sums


def row_sums(kernel, weights):
  """sum_j K_ij w_j as a sum of vectors over t: [n, n, t], [n, t] -> [n, t]."""
  terms = [kernel[:, j] * weights[j : j + 1] for j in range(weights.shape[0])]
  return functools.reduce(jnp.add, terms)


def column_sums(kernel, weights):
  """sum_i K_ij w_i: [n, n, t], [n, t] -> [n, t]."""
  terms = [kernel[i] * weights[i : i + 1] for i in range(weights.shape[0])]
  return functools.reduce(jnp.add, terms)


def scale(kernel, rows, columns):
  return kernel / (rows[:, None] * columns[None])


def row_adjoint(kernel, grad, rows, columns):
  """Back through a row step that led to the divisors (rows, columns)."""
  sums = functools.reduce(jnp.add, [grad[:, j] for j in range(len(grad))])
  return grad - kernel * ((sums / rows)[:, None] * (1 / columns)[None])


def column_adjoint(kernel, grad, rows, columns):
  """Back through a column step that led to (rows, columns)."""
  sums = functools.reduce(jnp.add, list(grad))
  return grad - kernel * ((1 / rows)[:, None] * (sums / columns)[None])


def start_adjoint(eps, kernel, grad, rows, columns):
  """Back through `start`: from D to the gradient of the logits."""
  if not eps:
    return column_adjoint(kernel, grad, rows, columns)
  softmax = kernel - eps
  d_softmax = grad / kernel
  return softmax * (
    d_softmax - jnp.sum(d_softmax * softmax, axis=0, keepdims=True)
  )
