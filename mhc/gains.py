r"""What a residual mapping, or a product of them, does to a signal.

A stack of connections carries the streams through H_L ... H_2 H_1 (mHC,
arXiv 2512.24880, Eq. 4). The paper's Amax gain magnitude of a matrix M is

    forward   max_i | sum_j M_ij |    (rows: what the streams grow by),
    backward  max_j | sum_i M_ij |    (columns: what their gradients grow by),

absolute values of *signed* sums. Both are 1 for doubly stochastic M, whatever
becomes of the streams' differences: of the n dimensions of the streams, mixing
keeps the mean and shrinks the n - 1 others. What is left of those is a singular
value of Q^T M Q, with Q [n, n - 1] an orthonormal basis of the vectors that sum
to 0.

All functions but `half_life` work in float32 on [..., n, n]. Products that
overflow give inf or nan, at their own place alone.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
import numpy as np

from mhc import explicit
from mhc import manifold

# What float32 products keep of differences is not told from rounding below:
# rows that sum to 1 up to 6e-8 turn the mean into differences as large.
FLOOR = 1e-7
# What `profile` returns.
PROFILE = (
  *('gain_fwd', 'gain_bwd', 'composite_fwd', 'composite_bwd', 'row_residual'),
  *('column_residual', 'column_residual_mean', 'column_residual_p99'),
  *('sigma_diff', 'sigma_diff_fwd', 'sigma_diff_bwd', 'effective_rank'),
  *('entropy', 'mean', 'mean_products'),
)
# The powers of two up to which `spectral_norm` takes a matrix.
SQUARINGS = 20


def amax_gain(
  matrices: Float[Array, '*batch n n'],
) -> tuple[Float[Array, '*batch'], Float[Array, '*batch']]:
  """The (forward, backward) Amax gain of each matrix (Sec. 3.1, Fig. 3)."""
  forward = jnp.max(jnp.abs(jnp.sum(matrices, axis=-1)), axis=-1)
  backward = jnp.max(jnp.abs(jnp.sum(matrices, axis=-2)), axis=-1)
  return forward, backward


def composites(
  matrices: Float[Array, 'l *batch n n'],
) -> tuple[Float[Array, 'l *batch n n'], Float[Array, 'l *batch n n']]:
  """Products over depth, newest on the left (Fig. 7b).

  Args:
    matrices: H_1 ... H_L of L sub-layers (attention and FFN counted apart).

  Returns:
    `upto[l] = H_l ... H_1`, what the forward signal has met after l, and
    `beyond[l] = H_L ... H_l`, what the gradient has met on its way back to l.
  """
  minor = jnp.moveaxis(matrices, (-2, -1), (1, 2))
  eye = jnp.eye(minor.shape[1], dtype=minor.dtype)
  eye = eye.reshape(eye.shape + (1,) * (minor.ndim - 3)) + minor[0] * 0

  def forward(product, h):
    product = _product(h, product)
    return product, product

  def backward(product, h):
    product = _product(product, h)
    return product, product

  _, upto = jax.lax.scan(forward, eye, minor)
  _, beyond = jax.lax.scan(backward, eye, minor, reverse=True)
  return tuple(jnp.moveaxis(x, (1, 2), (-2, -1)) for x in (upto, beyond))


def profile(matrices: Float[Array, 'l s n n']) -> dict[str, Array]:
  r"""The quantities of the paper's Fig. 7 and 8, of H_1 ... H_L on s tokens.

  Gains are taken for each token and then averaged (the captions say "averaged
  over all tokens"; the gain of the averaged matrix would hide opposite signs),
  and so is everything else but the residuals.

  Returns:
    gain_fwd, gain_bwd [l]: of each mapping alone.
    composite_fwd [l]: forward gain of H_l ... H_1.
    composite_bwd [l]: backward gain of H_L ... H_l.
    row_residual, column_residual [l]: max over tokens of |sum - 1|.
    column_residual_mean [l]: |column sum - 1|, mean over tokens and columns.
    column_residual_p99 [l]: 99th percentile over tokens of its max over
      columns.
    sigma_diff, sigma_diff_fwd, sigma_diff_bwd [l]: see `differences_kept`.
    effective_rank, entropy [l]: of H_l ... H_1, see the functions.
    mean [l, n, n]: the mappings averaged over tokens.
    mean_products [3, n, n]: averaged products of the first half, the second
      half and all of the mappings.
  """
  replicated = dict.fromkeys(PROFILE, PartitionSpec())
  return explicit.call(_profile, matrices, lambda _: replicated, matrices)


def _profile(matrices):
  upto, beyond = composites(matrices)
  gain_fwd, gain_bwd = amax_gain(matrices)
  row_residual, column_residual = manifold.residuals(matrices)
  half = matrices.shape[0] // 2
  products = jnp.stack([upto[half - 1], beyond[half], upto[-1]])
  columns = jnp.abs(jnp.sum(matrices, axis=-2) - 1)
  alone, forward, backward = differences_kept(matrices)
  return {
    'gain_fwd': jnp.mean(gain_fwd, axis=1),
    'gain_bwd': jnp.mean(gain_bwd, axis=1),
    'composite_fwd': jnp.mean(amax_gain(upto)[0], axis=1),
    'composite_bwd': jnp.mean(amax_gain(beyond)[1], axis=1),
    'row_residual': jnp.max(row_residual, axis=1),
    'column_residual': jnp.max(column_residual, axis=1),
    'column_residual_mean': jnp.mean(columns, axis=(1, 2)),
    'column_residual_p99': jnp.percentile(column_residual, 99.0, axis=1),
    'sigma_diff': jnp.mean(alone, axis=1),
    'sigma_diff_fwd': jnp.mean(forward, axis=1),
    'sigma_diff_bwd': jnp.mean(backward, axis=1),
    'effective_rank': jnp.mean(effective_rank(upto), axis=1),
    'entropy': jnp.mean(entropy(upto), axis=1),
    'mean': jnp.mean(matrices, axis=1),
    'mean_products': jnp.mean(products, axis=1),
  }


def differences_kept(
  matrices: Float[Array, 'l *batch n n'],
) -> tuple[
  Float[Array, 'l *batch'], Float[Array, 'l *batch'], Float[Array, 'l *batch']
]:
  r"""The most that is left of a difference of the streams: |Q^T M Q|_2.

  Products are made in the basis [1 / sqrt(n), Q], where rows and columns that
  sum to 1 leave the differences to themselves: what has shrunk to 1e-7 still
  has its digits, where the same number would be rounding in a product of
  entries near 1 / n. What rows miss of a sum of 1 (6e-8) times what columns
  miss of it is lost below that: take values of less than `FLOOR` for 0.

  Args:
    matrices: H_1 ... H_L.

  Returns:
    three times the largest singular value of Q^T M Q, for M = H_l, for
    M = H_l ... H_1 and for M = H_L ... H_l. 0 for n = 1, where there are no
    differences.
  """
  minor = jnp.moveaxis(matrices, (-2, -1), (0, 1))
  basis = _mean_and_differences(len(minor))
  basis = basis.reshape(basis.shape + (1,) * (minor.ndim - 2))
  turned = _product(_product(basis, minor), basis)
  turned = jnp.moveaxis(turned, (0, 1), (-2, -1))
  every = jnp.stack([turned, *composites(turned)])
  alone, forward, backward = spectral_norm(every[..., 1:, 1:])
  return alone, forward, backward


def spectral_norm(
  matrices: Float[Array, '*batch n n'],
) -> Float[Array, '*batch']:
  r"""Largest singular value; at most 1 on the Birkhoff polytope (Sec. 4.1).

  sqrt(tr(G P)) with G = M^T M and P = G^N / tr(G^N), which for large N projects
  onto the largest singular vectors. N = 2^20 by repeated squaring, without
  LAPACK: it is too small by at most a fraction (n - 1) / (2 e N), 5e-7 for
  n = 4, beside rounding. 0 for n = 0.
  """
  if matrices.shape[-1] == 0:
    return jnp.zeros(matrices.shape[:-2])
  minor, scale = _scaled(matrices)
  gram = _gram(minor)
  power = jax.lax.fori_loop(0, SQUARINGS, _squared, _over_trace(gram))
  norm = scale * jnp.sqrt(jnp.sum(gram * power, axis=(0, 1)))
  return jnp.where(scale == 0, 0, norm)


def effective_rank(
  matrices: Float[Array, '*batch n n'],
) -> Float[Array, '*batch']:
  """The participation ratio (sum_i s_i^2)^2 / sum_i s_i^4 of singular values.

  n for I or a rotation, 1 for 11^T / n, nan for 0.
  """
  gram = _gram(_scaled(matrices)[0])
  return _trace(gram) ** 2 / jnp.sum(gram * gram, axis=(0, 1))


def entropy(matrices: Float[Array, '*batch n n']) -> Float[Array, '*batch']:
  """How evenly a row mixes: the entropy of |M_ij| / sum_j |M_ij|, over log n.

  The mean over rows: 0 for a permutation or n = 1, 1 for 11^T / n, nan with a
  row of zeros.
  """
  n = matrices.shape[-1]
  weights = jnp.abs(matrices)
  weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  nats = jnp.sum(jax.scipy.special.entr(weights), axis=-1)
  return jnp.mean(nats, axis=-1) / max(math.log(n), 1e-7)


def contraction(logits: Float[Array, '*batch n n']) -> Float[Array, '*batch']:
  r"""What a Sinkhorn matrix at most keeps of differences, from its logits.

      kappa = tanh(phi / 4),
      phi = max_ijkl (L_ij + L_kl - L_il - L_kj).

  Scaling rows and columns leaves the cross ratios H_ij H_kl / (H_il H_kj) as
  they are, exp of the sum above. So the coefficient by which H contracts
  Hilbert's metric (Birkhoff 1957) is known without the iteration, after any
  number of its steps. As its rows sum to one, H also shrinks the largest
  difference between streams by kappa, and a product of layers by the product of
  theirs.
  """
  between = logits[..., :, None, :] - logits[..., None, :, :]
  span = jnp.max(between, axis=-1) - jnp.min(between, axis=-1)
  return jnp.tanh(jnp.max(span, axis=(-2, -1)) / 4)


def streams_read(pre: Float[Array, '*batch n']) -> Float[Array, '*batch']:
  """The effective number of streams that H_pre reads.

  1 / sum_j p_j^2 with p = |H_pre| / sum_j |H_pre_j|: 1 where one stream is
  read, n where all are alike, nan for H_pre = 0.
  """
  weights = jnp.abs(pre)
  weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return 1 / jnp.sum(weights * weights, axis=-1)


def half_life(sigma_diff_fwd) -> float:
  """Number of sub-layers in which the streams' differences halve.

  ln 2 / -slope of the line through log sigma_l, least squares over l.

  Args:
    sigma_diff_fwd: [l], an array or a list, of `profile`. Values up to `FLOOR`
      and those that are not finite are left out.

  Returns:
    inf where they do not fall, nan of fewer than two values.
  """
  sigma = np.asarray(sigma_diff_fwd, np.float64)
  depth = np.flatnonzero(np.isfinite(sigma) & (sigma > FLOOR))
  if len(depth) < 2:
    return math.nan
  centred = depth - depth.mean()
  slope = float(centred @ np.log(sigma[depth]) / (centred @ centred))
  return math.log(2) / -slope if slope < 0 else math.inf


def _mean_and_differences(n) -> Float[Array, 'n n']:
  """[1 / sqrt(n), Q]: the reflection that takes 1 / sqrt(n) to e_1.

  Its entries are exact in float32 for n = 4, where they are +-1/2.
  """
  normal = np.full(n, n**-0.5) - np.eye(n)[0]
  square = normal @ normal
  basis = np.eye(n) - 2 * np.outer(normal, normal) / (square or 1)
  return jnp.asarray(basis, jnp.float32)


def _scaled(matrices):
  """Tokens-minor [n, n, ...] with a largest entry of 1, and what that was."""
  minor = jnp.moveaxis(matrices, (-2, -1), (0, 1))
  scale = jnp.max(jnp.abs(minor), axis=(0, 1))
  return minor / jnp.where(scale == 0, 1, scale)[None, None], scale


def _product(a, b):
  """A B, tokens-minor: small matrices multiply fastest as broadcasts."""
  return sum(a[:, k][:, None] * b[k][None] for k in range(len(b)))


def _gram(minor):
  """M^T M, tokens-minor; with M symmetric, its square."""
  return _product(jnp.swapaxes(minor, 0, 1), minor)


def _squared(_, power):
  return _over_trace(_gram(power))


def _over_trace(power):
  return power / _trace(power)[None, None]


def _trace(minor):
  return sum(minor[i, i] for i in range(len(minor)))
