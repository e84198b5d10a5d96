"""Operations on n residual streams, [..., n, d]: open, read, write, close.

`expand` opens the streams once, before the first sub-layer, and `Collapse`
closes them once, after the last. Doing either in every block would turn a
connection into n parallel plain residuals.

`normed_projection` makes the mappings' logits, `read` and `write` apply the
mappings. They carry adjoints by hand: XLA's own transposes of these broadcasts
build [t, n, n, d] products, up to 20 times slower on a CPU; and all three keep
the streams as they are given, in one copy, for the backward pass. Mappings are
float32 and lie tokens-minor, [n, t] and
[n, n, t]; streams keep their dtype, sums over them are float32.
"""

import functools
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import axes

HIGHEST = jax.lax.Precision.HIGHEST


def expand(
  x: Float[Array, '*batch d'], num_streams: int
) -> Float[Array, '*batch n d']:
  """Opens the streams: `num_streams` copies of x."""
  shape = (*x.shape[:-1], num_streams, x.shape[-1])
  return jnp.broadcast_to(x[..., None, :], shape)


class Collapse(nnx.Module):
  r"""Closes the streams, [..., n, d] -> [..., d], once per model.

  `'sum'` (the HC paper) and `'mean'` have no parameters. `'learned'` is
  DeepSeek-V4's head: sum_j (sigmoid(alpha raw_j / r + bias_j) + 1e-6) x_j with
  raw = x phi and r as in `MHC`; nd n + n + 1 parameters, phi = 0, alpha = 0.01,
  bias = 0 at the start. The final norm of a transformer makes all three the
  same function of equal streams.
  """

  def __init__(
    self,
    kind: Literal['sum', 'mean', 'learned'],
    dim: int,
    num_streams: int,
    *,
    norm_eps: float = 1e-20,
  ):
    if kind not in ('sum', 'mean', 'learned'):
      raise ValueError(
        f"collapse must be 'sum', 'mean' or 'learned', got {kind!r}"
      )
    self.kind = kind
    self.norm_eps = norm_eps
    if kind == 'learned':
      self.phi = nnx.Param(jnp.zeros((num_streams * dim, num_streams)))
      self.alpha = nnx.Param(jnp.full(1, 0.01, jnp.float32))
      self.bias = nnx.Param(jnp.zeros(num_streams))

  def __call__(self, x: Float[Array, '*batch n d']) -> Float[Array, '*batch d']:
    *batch, n, dim = x.shape
    tokens = x.reshape(-1, n, dim)
    match self.kind:
      case 'sum':
        return jnp.sum(x, axis=-2)
      case 'mean':
        return jnp.mean(x, axis=-2)
      case 'learned':
        raw = normed_projection(tokens, self.phi[...], self.norm_eps)
        logits = raw * self.alpha[...][None] + self.bias[...][None]
        weights = jax.nn.sigmoid(logits) + 1e-6
        return read(tokens, weights.T).reshape(*batch, dim)


def normed_projection(
  x: Float[Array, 't n d'], phi: Float[Array, 'nd k'], norm_eps: float
) -> Float[Array, 't k']:
  """(x / rms(x)) phi with the norm applied after the product (Eq. 14-16).

  The rms is over all nd numbers of a token; float32 whatever x is.
  """
  # Inside a shard_map phi may be whole on every device where x is not. Casting
  # it here, outside of the custom gradient, lets autodiff sum phi's gradient.
  return _normed_projection(x, axes.vary(phi, axes.over(x)), norm_eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed_projection(x, phi, norm_eps):
  return _normed_projection_fwd(x, phi, norm_eps)[0]


def _normed_projection_fwd(x, phi, norm_eps):
  flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
  raw = jnp.matmul(flat, phi, precision=HIGHEST)
  mean_square = jnp.mean(flat * flat, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(mean_square + norm_eps)
  return raw * scale, (x, phi, raw, scale)


def _normed_projection_bwd(norm_eps, kept, g):
  """With m = x phi and s = 1 / rms: dm = g s, ds = sum(g m), s' = -s^3 / 2."""
  del norm_eps
  x, phi, raw, scale = kept
  flat = x.reshape(x.shape[0], -1).astype(jnp.float32)
  d_raw = g * scale
  d_square = -0.5 * jnp.sum(g * raw, axis=-1, keepdims=True) * scale**3
  d_flat = jnp.matmul(d_raw, phi.T, precision=HIGHEST)
  d_flat = d_flat + flat * (2 / flat.shape[1] * d_square)
  d_phi = jnp.matmul(flat.T, d_raw, precision=HIGHEST)
  return d_flat.reshape(x.shape).astype(x.dtype), d_phi


_normed_projection.defvjp(_normed_projection_fwd, _normed_projection_bwd)


@jax.custom_vjp
def read(
  x: Float[Array, 't n d'], pre: Float[Array, 'n t']
) -> Float[Array, 't d']:
  """sum_j pre_j x_j, of every token t (Eq. 3, H_pre x)."""
  wide = x.astype(jnp.float32)
  terms = [pre[j][:, None] * wide[:, j] for j in range(x.shape[1])]
  return sum(terms[1:], terms[0]).astype(x.dtype)


def _read_fwd(x, pre):
  return read(x, pre), (x, pre)


def _read_bwd(kept, g):
  x, pre = kept
  wide = g.astype(jnp.float32)
  d_x = (pre.T[..., None] * wide[:, None]).astype(x.dtype)
  d_pre = jnp.einsum(
    'tc,tjc->tj', wide, x.astype(jnp.float32), precision=HIGHEST
  )
  return d_x, d_pre.T


read.defvjp(_read_fwd, _read_bwd)


@jax.custom_vjp
def write(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
) -> Float[Array, 't n d']:
  """sum_j res_ij x_j + post_i y, of every token t; `res=None` stands for I.

  Row i of `res` makes stream i: H_res is contracted over its columns (Eq. 3).
  """
  out = _mix(x, res) + post.T[..., None] * y[:, None].astype(jnp.float32)
  return out.astype(x.dtype)


def _write_fwd(x, y, post, res):
  return write(x, y, post, res), (x, y, post, res)


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


write.defvjp(_write_fwd, _write_bwd)


def _mix(x, res):
  """sum_j res_ij x_j in float32, one broadcast column of res at a time."""
  wide = x.astype(jnp.float32)
  if res is None:
    return wide
  terms = [
    res[:, j].T[..., None] * wide[:, j : j + 1] for j in range(x.shape[1])
  ]
  return sum(terms[1:], terms[0])
