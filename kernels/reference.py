r"""The specification: every operation that has a kernel, in plain jax.numpy.

Between two sub-layers the streams x, [t, n, d], are written and read once:

    post       x'_i = sum_j res_ij x_j + post_i y                      Eq. 3
    pre        z = x phi / rms(x),   h = sum_j sigma(a z_j + b_j) x_j  Eq. 14-17
    advance    both: post of one sub-layer, pre of the next
    collapse   post of the last sub-layer, and the sum of the streams

Here a and b are the alpha and the biases of H_pre; z holds all k numbers of the
projection, from which `coefficients` makes the mappings of the sub-layer.

Everything in the dtype of its arguments, so that tests can evaluate it in
float64. Streams are rounded to their own dtype where they are stored, and only
there: `post` and `advance` round x', which is what `advance` reads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn(
  logits: Float[Array, 'n n t'], num_iters: int, eps: float
) -> Float[Array, 'n n t']:
  """Columns, then rows, divided by their sums, `num_iters` times (Eq. 9).

  With eps > 0 as DeepSeek's kernels do it, see `manifold.sinkhorn_project`.
  """
  matrix = jax.nn.softmax(logits, axis=0) + eps
  for number in range(num_iters):
    if number:
      matrix = matrix / (jnp.sum(matrix, axis=0, keepdims=True) + eps)
    matrix = matrix / (jnp.sum(matrix, axis=1, keepdims=True) + eps)
  return matrix


def coefficients(
  z: Float[Array, 'k t'],
  alpha: Float[Array, '3'],
  bias: Float[Array, 'k'],
  n: int,
  num_iters: int,
  eps: float,
) -> tuple[Float[Array, 'n t'], Float[Array, 'n t'], Float[Array, 'n n t']]:
  """H_pre, H_post and H_res of each token, k = 2 n + n^2 (Eq. 16-19)."""
  bias = bias[:, None]
  pre = jax.nn.sigmoid(alpha[0] * z[:n] + bias[:n])
  post = 2 * jax.nn.sigmoid(alpha[1] * z[n : 2 * n] + bias[n : 2 * n])
  logits = alpha[2] * z[2 * n :] + bias[2 * n :]
  return pre, post, sinkhorn(logits.reshape(n, n, -1), num_iters, eps)


def pre(
  x: Float[Array, 't n d'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
) -> tuple[Float[Array, 't d'], Float[Array, 'k t']]:
  """Returns the input of the sub-layer and the projection z."""
  flat = x.reshape(len(x), -1).astype(phi.dtype)
  mean_square = jnp.mean(flat * flat, axis=1, keepdims=True)
  z = (jnp.matmul(flat, phi) / jnp.sqrt(mean_square + norm_eps)).T
  weights = jax.nn.sigmoid(alpha * z[: x.shape[1]] + bias[:, None])
  h = jnp.einsum('jt,tjd->td', weights, x.astype(phi.dtype))
  return h.astype(x.dtype), z


def post(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
) -> Float[Array, 't n d']:
  """The streams behind a sub-layer that returned y."""
  wide = x.astype(res.dtype)
  mixed = jnp.einsum('ijt,tjd->tid', res, wide)
  mixed = mixed + jnp.einsum('it,td->tid', post, y.astype(res.dtype))
  return mixed.astype(x.dtype)


def advance(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post_weights: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
) -> tuple[Float[Array, 't n d'], Float[Array, 't d'], Float[Array, 'k t']]:
  """`post`, then `pre` of the next sub-layer: the streams, h and z."""
  x = post(x, y, post_weights, res)
  return x, *pre(x, phi, alpha, bias, norm_eps)


def collapse(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post_weights: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
) -> Float[Array, 't d']:
  """The sum of the streams behind the last sub-layer, rounded once."""
  total = jnp.einsum('jt,tjd->td', jnp.sum(res, axis=0), x.astype(res.dtype))
  total = total + jnp.sum(post_weights, axis=0)[:, None] * y.astype(res.dtype)
  return total.astype(x.dtype)
