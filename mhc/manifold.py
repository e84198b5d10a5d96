r"""Projection onto the doubly stochastic matrices (the Birkhoff polytope).

The polytope is B_n = {H in R^{n x n} : H 1 = 1, 1^T H = 1^T, H >= 0}
(mHC, arXiv 2512.24880, Eq. 6). Its elements have spectral norm 1 and their
products stay in B_n, which is why a deep stack of them neither amplifies nor
loses the mean of the residual streams.

`sinkhorn_project` maps any real matrix L into it (Eq. 9): M = exp(L), then
`num_iters` times: divide columns by their sums, divide rows by their sums.

`scaling` holds the iteration itself.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc.kernels.xla import sinkhorn

Backward = Literal['recompute', 'unrolled', 'implicit']


def sinkhorn_project(
  logits: Float[Array, '...'],
  num_iters: int = 20,
  eps: float = 1e-6,
  backward: Backward = 'recompute',
  *,
  axes: tuple[int, int] = (-2, -1),
) -> Float[Array, '...']:
  r"""Projects square matrices onto the doubly stochastic ones.

  Columns are normalised first and rows last (Eq. 9), so row sums are exact and
  what is left of the finite iteration shows in the column sums:
  `residuals` measures it.

  With `eps = 0` this is Eq. 9. With `eps > 0` it is the variant of DeepSeek's
  released kernels: eps is added to every entry after a first, max-shifted
  softmax over the columns, and to every later divisor. DeepSeek-V4 applies
  the matrix transposed (`comb[j, k]` takes stream j to stream k) and
  normalises its rows first; its `comb` is the transpose of the result here,

      comb(logits) = sinkhorn_project(logits.T, 20, 1e-6).T.

  The three backward passes differ in what they keep and in what they are the
  gradient of:

  * `'recompute'`: the exact gradient of the truncated iteration. Keeps the
    logits only; the divisors are computed again, the adjoint walks back
    through them. Reverse mode only: `jax.jvp` raises a TypeError.
  * `'unrolled'`: autodiff through the iteration, forward and reverse mode. The
    oracle; keeps 2 n `num_iters` + O(n^2) numbers a matrix.
  * `'implicit'`: the gradient of the *limit* of the iteration, from the
    stationarity of its fixed point. Keeps the result only and costs one
    n x n solve, but is right only at convergence: on 4 x 4 matrices with
    20 iterations its error, relative to the exact gradient's norm, is 8e-7
    (median) and 2e-5 (99th percentile) for logits of standard deviation 1,
    but 2e-2 and 1 at standard deviation 5 (`recompute`: 2e-7 and 8e-7).
    Reverse mode only.

  Args:
    logits: any floating dtype and any shape, with two equal dimensions at
      `axes`; cast to float32.
    num_iters: number of iterations t_max, at least 1; the paper uses 20.
    eps: 0, or from 1e-12 up to 1e-2.
    backward: see above.
    axes: the (row, column) dimensions. With `axes=(0, 1)` nothing is
      transposed and the remaining dimensions, tokens, lie on the minor
      axis, where vector units want them.

  Returns:
    float32, the shape of `logits`: the projected matrices.

  Raises:
    ValueError: the dimensions at `axes` differ or are empty, or an argument is
      out of its range.
  """
  row_dim, col_dim = axes
  if logits.ndim < 2 or logits.shape[row_dim] != logits.shape[col_dim]:
    raise ValueError(
      f'sinkhorn_project needs square matrices at axes {axes}, '
      f'got the shape {logits.shape}'
    )
  size = logits.shape[row_dim]
  if size < 1:
    raise ValueError(f'sinkhorn_project needs n >= 1, got {logits.shape}')
  if num_iters < 1:
    raise ValueError(f'num_iters must be at least 1, got {num_iters}')
  if eps != 0 and not 1e-12 <= eps <= 1e-2:
    raise ValueError(f'eps must be 0 or from 1e-12 to 1e-2, got {eps}')
  match backward:
    case 'recompute':
      project = _project_recompute
    case 'unrolled':
      project = _project_unrolled
    case 'implicit':
      project = _project_implicit
    case _:
      raise ValueError(
        "backward must be 'recompute', 'unrolled' or 'implicit', "
        f'got {backward!r}'
      )
  minor = jnp.moveaxis(logits.astype(jnp.float32), axes, (0, 1))
  flat = minor.reshape(size, size, -1)
  out = project(num_iters, float(eps), flat).reshape(minor.shape)
  return jnp.moveaxis(out, (0, 1), axes)


def residuals(
  matrices: Float[Array, '*batch n n'],
) -> tuple[Float[Array, '*batch'], Float[Array, '*batch']]:
  """Distance to the polytope's affine hull: max |row sum - 1|, columns alike.

  Together with non-negativity, both zero is membership in B_n.
  """
  rows = jnp.max(jnp.abs(jnp.sum(matrices, axis=-1) - 1), axis=-1)
  columns = jnp.max(jnp.abs(jnp.sum(matrices, axis=-2) - 1), axis=-1)
  return rows, columns


# On [n, n, t]: matrices in front, t of them on the minor axis.


def _project(num_iters, eps, logits):
  kernel, _, (rows, columns), _ = sinkhorn.divisors(num_iters, eps, logits)
  return sinkhorn.scale(kernel, rows, columns)


def _project_unrolled(num_iters, eps, logits):
  """The definition, entry by entry."""
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


_project_recompute = jax.custom_vjp(_project, nondiff_argnums=(0, 1))
_project_implicit = jax.custom_vjp(_project, nondiff_argnums=(0, 1))


def _recompute_fwd(num_iters, eps, logits):
  return _project(num_iters, eps, logits), logits


def _recompute_bwd(num_iters, eps, logits, g):
  """The adjoint of the truncated iteration, walked back step by step."""
  kernel, rows0, last, history = sinkhorn.divisors(num_iters, eps, logits)

  def iterate(carry, before):
    grad, (rows, columns) = carry
    grad = sinkhorn.row_adjoint(kernel, grad, rows, columns)
    grad = sinkhorn.column_adjoint(kernel, grad, before[0], columns)
    return (grad, before), None

  carry = (g * sinkhorn.scale(kernel, *last), last)
  carry, _ = jax.lax.scan(iterate, carry, history, reverse=True)
  grad, (rows, columns) = carry
  grad = sinkhorn.row_adjoint(kernel, grad, rows, columns)
  return (sinkhorn.start_adjoint(eps, kernel, grad, rows0, columns),)


_project_recompute.defvjp(_recompute_fwd, _recompute_bwd)


def _implicit_fwd(num_iters, eps, logits):
  out = _project(num_iters, eps, logits)
  return out, out


def _implicit_bwd(num_iters, eps, out, g):
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


_project_implicit.defvjp(_implicit_fwd, _implicit_bwd)

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
