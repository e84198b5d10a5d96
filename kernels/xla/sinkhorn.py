r"""Sinkhorn's iteration by its divisors, and the adjoint.

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
block of tokens in a kernel (kernels/sinkhorn.py).
"""

import functools

import jax
import jax.numpy as jnp


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
