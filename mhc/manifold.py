r"""Projection onto the doubly stochastic matrices (the Birkhoff polytope).

The polytope is B_n = {H in R^{n x n} : H 1 = 1, 1^T H = 1^T, H >= 0}
(mHC, arXiv 2512.24880, Eq. 6). Its elements have spectral norm 1 and their
products stay in B_n, which is why a deep stack of them neither amplifies nor
loses the mean of the residual streams.

`sinkhorn_project` maps any real matrix L into it (Eq. 9): M = exp(L), then
`num_iters` times: divide columns by their sums, divide rows by their sums. It
is one operation with several implementations: the iteration and its adjoint
stand in kernels/xla/sinkhorn.py, the kernels beside it. With `method='newton'`
the iteration's limit takes its place, see kernels/xla/newton.py.
"""

import functools
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import explicit
from mhc import kernels
from mhc.kernels.xla import newton
from mhc.kernels.xla import sinkhorn as xla

Backward = Literal['recompute', 'unrolled', 'implicit']
Method = Literal['sinkhorn', 'newton']


def sinkhorn_project(
  logits: Float[Array, '...'],
  num_iters: int = kernels.SINKHORN_ITERS,
  eps: float = kernels.SINKHORN_EPS,
  backward: Backward = 'recompute',
  *,
  method: Method = 'sinkhorn',
  axes: tuple[int, int] = (-2, -1),
  implementation: kernels.Implementation | None = None,
) -> Float[Array, '...']:
  r"""Projects square matrices onto the doubly stochastic ones.

  Columns are normalised first and rows last (Eq. 9), so row sums are exact;
  what is left of the iteration shows in column sums, see `residuals`.

  With `eps = 0` this is Eq. 9. With `eps > 0` it is the variant of DeepSeek's
  released kernels: eps is added to every entry after a first, max-shifted
  softmax over the columns, and to every later divisor. DeepSeek-V4 applies
  the matrix transposed (`comb[j, k]` takes stream j to stream k) and
  normalises its rows first; its `comb` is the transpose of the result here,

      comb(logits) = sinkhorn_project(logits.T, 20, 1e-6).T.

  Backward passes differ in what they keep and of what they are the gradient:

  * `'recompute'`: the exact gradient of the truncated iteration. Keeps the
    logits only; the adjoint walks back through the divisors, computed again.
    Reverse mode only, to any order: `jax.jvp` raises a TypeError.
  * `'unrolled'`: autodiff through the iteration, forward and reverse mode. The
    oracle; keeps 2 n `num_iters` + O(n^2) numbers a matrix.
  * `'implicit'`: the gradient of the *limit* of the iteration, from the
    stationarity of its fixed point. Keeps the result only and costs one
    n x n solve, but is right only at convergence: on 4 x 4 matrices with
    20 iterations its error, relative to the exact gradient's norm, is 8e-7
    (median) and 2e-5 (99th percentile) for logits of standard deviation 1,
    but 2e-2 and 1 at standard deviation 5 (`recompute`: 2e-7 and 8e-7).
    Reverse mode only.

  With `method='newton'` the result is the limit of the iteration, by
  `num_iters` steps of Newton's method. 8 of them bring the columns within 1e-6
  up to n = 8 and logits of standard deviation 30 (docs/designs.md). The
  gradient is the limit's, also near permutations. Plain JAX.

  Args:
    logits: any floating dtype and any shape, with two equal dimensions at
      `axes`; cast to float32.
    num_iters: number of iterations t_max, at least 1; the paper uses 20.
    eps: 0, or from 1e-12 up to 1e-2.
    backward: see above.
    method: 'sinkhorn' or 'newton', see above.
    axes: the (row, column) dimensions. With `axes=(0, 1)` nothing is
      transposed and the remaining dimensions, tokens, lie on the minor
      axis, where vector units want them.
    implementation: 'xla', 'pallas' (TPU) or 'triton' (GPU); None is the
      fastest that the platform has, see `mhc.kernels`. The kernels have the
      exact gradient, `backward='recompute'`, alone, and no second derivative.
      'autodiff' is `backward='unrolled'`.

  Returns:
    float32, the shape of `logits`: the projected matrices.

  Raises:
    ValueError: the dimensions at `axes` differ or are empty, or an argument is
      out of its range.
    TypeError: the logits are no real numbers.
    NotImplementedError: the implementation that was named cannot serve the
      call, and why.
  """
  logits = jnp.asarray(logits)
  _check(logits, num_iters, eps, axes)
  eps = float(eps)
  project = _chosen(method, backward, eps, implementation)

  def run(logits):
    minor = jnp.moveaxis(logits.astype(jnp.float32), axes, (0, 1))
    n = len(minor)
    out = project(minor.reshape(n, n, minor.size // n**2), num_iters, eps)
    return jnp.moveaxis(out.reshape(minor.shape), (0, 1), axes)

  return explicit.call(run, logits, lambda spec: spec, logits)


def residuals(
  matrices: Float[Array, '*batch n n'],
) -> tuple[Float[Array, '*batch'], Float[Array, '*batch']]:
  """Distance to the polytope's affine hull: max |row sum - 1|, columns alike.

  Together with non-negativity, both zero is membership in B_n.
  """
  rows = jnp.max(jnp.abs(jnp.sum(matrices, axis=-1) - 1), axis=-1)
  columns = jnp.max(jnp.abs(jnp.sum(matrices, axis=-2) - 1), axis=-1)
  return rows, columns


def check_newton(backward, eps, implementation=None):
  """Checks that nothing is asked for that the limit does not have.

  Raises:
    ValueError: the gradient of an iteration, or its eps.
    NotImplementedError: an implementation other than plain JAX.
  """
  if backward == 'unrolled' or eps:
    raise ValueError(
      f"method='newton' has no iteration, got backward={backward!r} and "
      f"eps={eps}: leave them, or take method='sinkhorn'"
    )
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f"implementation={implementation!r} has no method='newton', which is "
      'plain JAX: leave one of the two out'
    )


def _chosen(method, backward, eps, implementation):
  if method == 'newton':
    check_newton(backward, eps, implementation)
    return lambda logits, num_steps, _: newton.newton(logits, num_steps)
  if method != 'sinkhorn':
    raise ValueError(f"method must be 'sinkhorn' or 'newton', got {method!r}")
  match backward:
    case 'recompute':
      return functools.partial(kernels.sinkhorn, implementation=implementation)
    case 'unrolled' | 'implicit':
      if implementation not in (None, 'xla'):
        raise NotImplementedError(
          f'implementation={implementation!r} has no backward={backward!r}, '
          "only 'recompute': leave one of the two out"
        )
      return getattr(xla, backward)
    case _:
      raise ValueError(
        "backward must be 'recompute', 'unrolled' or 'implicit', "
        f'got {backward!r}'
      )


def _check(logits, num_iters, eps, axes):
  if jnp.issubdtype(logits.dtype, jnp.complexfloating):
    raise TypeError(
      f'sinkhorn_project takes real logits, got {logits.dtype}: give their '
      'real part or absolute value'
    )
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
