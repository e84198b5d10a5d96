r"""How much a residual mapping, or a product of them, can amplify a signal.

A stack of connections carries the streams through H_L ... H_2 H_1 (mHC,
arXiv 2512.24880, Eq. 4). The paper's Amax gain magnitude of a matrix M is

    forward   max_i | sum_j M_ij |    (rows: what the streams grow by),
    backward  max_j | sum_i M_ij |    (columns: what their gradients grow by),

absolute values of *signed* sums. Both are 1 for doubly stochastic M.
All functions work in float32 on [..., n, n].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import manifold


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
  eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
  eye = jnp.broadcast_to(eye, matrices.shape[1:]) + matrices[0] * 0

  def forward(product, h):
    product = _matmul(h, product)
    return product, product

  def backward(product, h):
    product = _matmul(product, h)
    return product, product

  _, upto = jax.lax.scan(forward, eye, matrices)
  _, beyond = jax.lax.scan(backward, eye, matrices, reverse=True)
  return upto, beyond


def profile(matrices: Float[Array, 'l s n n']) -> dict[str, Array]:
  """The quantities of the paper's Fig. 7 and 8, of H_1 ... H_L on s tokens.

  Gains are taken for each token and then averaged (the captions say "averaged
  over all tokens"; the gain of the averaged matrix would hide opposite signs).

  Returns:
    gain_fwd, gain_bwd [l]: of each mapping alone.
    composite_fwd [l]: forward gain of H_l ... H_1.
    composite_bwd [l]: backward gain of H_L ... H_l.
    row_residual, column_residual [l]: max over tokens of |sum - 1|.
    mean [l, n, n]: the mappings averaged over tokens.
    mean_products [3, n, n]: averaged products of the first half, the second
      half and all of the mappings.
  """
  upto, beyond = composites(matrices)
  gain_fwd, gain_bwd = amax_gain(matrices)
  row_residual, column_residual = manifold.residuals(matrices)
  half = matrices.shape[0] // 2
  products = jnp.stack([upto[half - 1], beyond[half], upto[-1]])
  return {
    'gain_fwd': jnp.mean(gain_fwd, axis=1),
    'gain_bwd': jnp.mean(gain_bwd, axis=1),
    'composite_fwd': jnp.mean(amax_gain(upto)[0], axis=1),
    'composite_bwd': jnp.mean(amax_gain(beyond)[1], axis=1),
    'row_residual': jnp.max(row_residual, axis=1),
    'column_residual': jnp.max(column_residual, axis=1),
    'mean': jnp.mean(matrices, axis=1),
    'mean_products': jnp.mean(products, axis=1),
  }


def spectral_norm(
  matrices: Float[Array, '*batch n n'],
) -> Float[Array, '*batch']:
  """Largest singular value; at most 1 on the Birkhoff polytope (Sec. 4.1)."""
  return jnp.linalg.norm(matrices, ord=2, axis=(-2, -1))


def second_eigenvalue(
  matrices: Float[Array, '*batch n n'],
) -> Float[Array, '*batch']:
  """|lambda_2|: how much of the streams' differences one mapping keeps.

  0 for n = 1, where there are no differences. Eigenvalues of general matrices
  exist in JAX on CPU only.
  """
  if matrices.shape[-1] == 1:
    return jnp.zeros(matrices.shape[:-2], matrices.dtype)
  moduli = jnp.abs(jnp.linalg.eigvals(matrices))
  return jnp.sort(moduli, axis=-1)[..., -2]


def _matmul(a, b):
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
