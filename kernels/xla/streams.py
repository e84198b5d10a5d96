"""Passes over n residual streams in plain JAX, with adjoints by hand.

XLA's own transposes of these broadcasts build [t, n, n, d] products, up to 20
times slower on a CPU. Each function keeps the streams as they are given, in one
copy, for its backward pass. Coefficients are float32 and lie tokens-minor,
[n, t] and [n, n, t]; streams keep their dtype, sums over them are float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import axes

HIGHEST = jax.lax.Precision.HIGHEST


def normed_projection(
  x: Float[Array, 't n d'], phi: Float[Array, 'nd k'], norm_eps: float
) -> Float[Array, 't k']:
  """(x / rms(x)) phi with the norm applied after the product (Eq. 14-16).

  The rms is over all nd numbers of a token; float32 whatever x is.
  """
  # Inside a shard_map phi may be whole on every device where x is not. Casting
  # it here, outside of the custom gradient, lets autodiff sum phi's gradient.
  return _normed_projection(
    x, axes.cast_varying(phi, axes.varying_axes(x)), norm_eps
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed_projection(x, phi, norm_eps):
  return _normed_projection_fwd(x, phi, norm_eps)[0]


def _normed_projection_fwd(x, phi, norm_eps):
  flat = x.reshape(len(x), x.shape[1] * x.shape[2]).astype(jnp.float32)
  raw = jnp.matmul(flat, phi, precision=HIGHEST)
  mean_square = jnp.mean(flat * flat, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(mean_square + norm_eps)
  return raw * scale, (x, phi, raw, scale)


def _normed_projection_bwd(norm_eps, kept, g):
  """With m = x phi and s = 1 / rms: dm = g s, ds = sum(g m), s' = -s^3 / 2."""
  del norm_eps
  x, phi, raw, scale = kept
  flat = x.reshape(len(x), x.shape[1] * x.shape[2]).astype(jnp.float32)
  d_raw = g * scale
  d_square = -0.5 * jnp.sum(g * raw, axis=-1, keepdims=True) * scale**3
  d_flat = jnp.matmul(d_raw, phi.T, precision=HIGHEST)
  d_flat = d_flat + flat * (2 / flat.shape[1] * d_square)
  d_phi = jnp.matmul(flat.T, d_raw, precision=HIGHEST)
  return d_flat.reshape(x.shape).astype(x.dtype), d_phi


_normed_projection.defvjp(_normed_projection_fwd, _normed_projection_bwd)


def read(
  x: Float[Array, 't n d'], pre: Float[Array, 'n t']
) -> Float[Array, 't d']:
  """sum_j pre_j x_j, of every token t (Eq. 3, H_pre x)."""
  # Weights may be constants, which differ on no two devices.
  return _read(*axes.unify_varying(x, pre))


@jax.custom_vjp
def _read(x, pre):
  wide = x.astype(jnp.float32)
  terms = [pre[j][:, None] * wide[:, j] for j in range(x.shape[1])]
  return sum(terms[1:], terms[0]).astype(x.dtype)


def _read_fwd(x, pre):
  return _read(x, pre), (x, pre)


def _read_bwd(kept, g):
  x, pre = kept
  wide = g.astype(jnp.float32)
  d_x = (pre.T[..., None] * wide[:, None]).astype(x.dtype)
  d_pre = jnp.einsum(
    'tc,tjc->tj', wide, x.astype(jnp.float32), precision=HIGHEST
  )
  return d_x, d_pre.T


_read.defvjp(_read_fwd, _read_bwd)


def write(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
) -> Float[Array, 't n d']:
  """sum_j res_ij x_j + post_i y, of every token t; `res=None` stands for I.

  Row i of `res` makes stream i: H_res is contracted over its columns (Eq. 3).
  """
  return _write(*axes.unify_varying(x, y, post, res))


@jax.custom_vjp
def _write(x, y, post, res):
  out = _mix(x, res) + post.T[..., None] * y[:, None].astype(jnp.float32)
  return out.astype(x.dtype)


def _write_fwd(x, y, post, res):
  return _write(x, y, post, res), (x, y, post, res)


def _write_bwd(kept, g):
  x, y, post, res = kept
  wide = g.astype(jnp.float32)
  d_x = _mix(wide, None if res is None else jnp.swapaxes(res, 0, 1))
  d_y = [post[i][:, None] * wide[:, i] for i in range(wide.shape[1])]
  d_post = jnp.einsum(
    'tic,tc->ti', wide, y.astype(jnp.float32), precision=HIGHEST
  )
  d_res = None
  if res is not None:
    d_res = jnp.einsum(
      'tic,tjc->tij', wide, x.astype(jnp.float32), precision=HIGHEST
    )
    d_res = jnp.moveaxis(d_res, 0, -1)
  return (
    d_x.astype(x.dtype),
    sum(d_y[1:], d_y[0]).astype(y.dtype),
    d_post.T,
    d_res,
  )


_write.defvjp(_write_fwd, _write_bwd)


def _mix(x, res):
  """sum_j res_ij x_j in float32, one broadcast column of res at a time."""
  wide = x.astype(jnp.float32)
  if res is None:
    return wide
  terms = [
    res[:, j].T[..., None] * wide[:, j : j + 1] for j in range(x.shape[1])
  ]
  return sum(terms[1:], terms[0])
