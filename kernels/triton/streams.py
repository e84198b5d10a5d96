"""`pre`, `post`, `advance` and `collapse` as Triton kernels, with gradients.

Signatures and meaning are those of kernels/reference.py; the channels must be
a multiple of 128. Numbers of d that a token moves through HBM, L2 aside:

              forward          backward
    pre       2 n + 1          3 n + 2
    post      2 n + 1          3 n + 2
    advance   3 n + 2          4 n + 5
    collapse  n + 2            2 n + 3

Of these, n of `pre` and `advance` forward and n + 2 of `advance` backward (n +
1 of `pre`) are second reads: see stream_forward.py.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import triton

from mhc.kernels.triton import launch
from mhc.kernels.triton import stream_backward
from mhc.kernels.triton import stream_forward

# (tokens, channels) of a tile, warps, stages of loads in flight.
BLOCKS = {
  'pre_forward': (32, 64, 4, 2),
  'advance_forward': (32, 64, 4, 2),
  'post_forward': (16, 64, 4, 1),
  'collapse_forward': (16, 64, 4, 1),
  'pre_dots': (16, 64, 4, 1),
  'advance_dots': (16, 64, 4, 1),
  'collapse_backward': (16, 64, 4, 1),
  'post_backward': (16, 64, 4, 1),
  'pre_backward': (16, 64, 4, 2),
  'advance_backward': (16, 64, 8, 2),
}
# The same for more than 4 streams or, with K numbers of the projection, n K >
# 128: that many numbers of phi and of its gradient belong to a channel.
WIDE_BLOCKS = BLOCKS | {
  'pre_forward': (32, 64, 8, 1),
  'advance_forward': (16, 64, 8, 1),
  'post_backward': (16, 32, 8, 1),
  'pre_backward': (16, 16, 8, 1),
  'advance_backward': (16, 16, 8, 1),
}
PROGRAMS = 528  # that hold gradients of phi: four a multiprocessor of an H100


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def pre(
  x: Float[Array, 't n d'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
) -> tuple[Float[Array, 't d'], Float[Array, 'k t']]:
  """Returns the input of the sub-layer and the projection z."""
  return _pre_forward(x, phi, alpha, bias, norm_eps)[0]


def _pre_forward(x, phi, alpha, bias, norm_eps):
  h, z, scale = launch.run(
    pre_forward(x, phi, norm_eps), x, parts(phi, x.dtype), alpha, bias
  )
  return (h, z), (x, phi, alpha, bias, z, scale)


def _pre_backward(norm_eps, kept, cotangents):
  del norm_eps
  x, phi, alpha, bias, z, scale = kept
  dh, dz = cotangents
  dots = launch.run(pre_dots(x), x, dh)[0]
  weights, slope, d_raw, d_alpha, d_bias = read_cotangents(
    dots, dz, z, scale, alpha, bias, phi.shape[0]
  )
  dx, d_phi = launch.run(
    pre_backward(x, phi),
    *(x, dh, weights, slope, d_raw, parts(phi, x.dtype)),
  )
  return dx, jnp.sum(d_phi, axis=0).T, d_alpha, d_bias


pre.defvjp(_pre_forward, _pre_backward)


@jax.custom_vjp
def post(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
) -> Float[Array, 't n d']:
  """The streams behind a sub-layer that returned y."""
  return launch.run(post_forward(x), x, y, post, res)[0]


def _post_forward(x, y, post_weights, res):
  return post(x, y, post_weights, res), (x, y, post_weights, res)


def _post_backward(kept, cotangent):
  x = kept[0]
  dx, dy, d_mix = launch.run(post_backward(x), *kept, cotangent)
  n = x.shape[1]
  return dx, dy, d_mix[:, n], d_mix[:, :n]


post.defvjp(_post_forward, _post_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def advance(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
) -> tuple[Float[Array, 't n d'], Float[Array, 't d'], Float[Array, 'k t']]:
  """`post`, then `pre` of the next sub-layer: the streams, h and z."""
  return _advance_forward(x, y, post, res, phi, alpha, bias, norm_eps)[0]


def _advance_forward(x, y, post_weights, res, phi, alpha, bias, norm_eps):
  out, h, z, scale = launch.run(
    advance_forward(x, phi, norm_eps),
    *(x, y, post_weights, res, parts(phi, x.dtype), alpha, bias),
  )
  kept = (x, y, post_weights, res, phi, alpha, bias, z, scale)
  return (out, h, z), kept


def _advance_backward(norm_eps, kept, cotangents):
  del norm_eps
  x, y, post_weights, res, phi, alpha, bias, z, scale = kept
  d_out, dh, dz = cotangents
  n = x.shape[1]
  dots = launch.run(advance_dots(x), x, y, post_weights, res, dh)[0]
  weights, slope, d_raw, d_alpha, d_bias = read_cotangents(
    dots, dz, z, scale, alpha, bias, phi.shape[0]
  )
  dx, dy, d_mix, d_phi = launch.run(
    advance_backward(x, phi),
    *(x, y, post_weights, res, d_out, dh, weights, slope, d_raw),
    parts(phi, x.dtype),
  )
  d_mix = jnp.sum(d_mix, axis=0).T.reshape(n, n + 1, -1)
  d_phi = jnp.sum(d_phi, axis=0).T
  return dx, dy, d_mix[:, n], d_mix[:, :n], d_phi, d_alpha, d_bias


advance.defvjp(_advance_forward, _advance_backward)


@jax.custom_vjp
def collapse(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'],
) -> Float[Array, 't d']:
  """The sum of the streams behind the last sub-layer, rounded once."""
  return launch.run(collapse_forward(x), x, y, _column_sums(post, res))[0]


def _collapse_forward(x, y, post_weights, res):
  return collapse(x, y, post_weights, res), (x, y, post_weights, res)


def _collapse_backward(kept, cotangent):
  x, y, post_weights, res = kept
  dx, dy, dots = launch.run(
    collapse_backward(x), x, y, cotangent, _column_sums(post_weights, res)
  )
  d_post = jnp.broadcast_to(dots[-1], post_weights.shape)
  return dx, dy, d_post, jnp.broadcast_to(dots[:-1], res.shape)


collapse.defvjp(_collapse_forward, _collapse_backward)


def _column_sums(post_weights, res):
  """1^T [res | post], [n + 1, t]."""
  last = jnp.sum(post_weights, axis=0, keepdims=True)
  return jnp.concatenate([jnp.sum(res, axis=0), last])


def parts(
  phi: Float[Array, 'nd k'], dtype: jnp.dtype
) -> Float[Array, 'p k nd']:
  """phi^T, as three bfloat16 parts that add up to it for bfloat16 streams."""
  if dtype == jnp.float32:
    return phi.T[None]
  out, rest = [], phi.T
  for _ in range(3):
    # Not a cast and back, which XLA may drop.
    rounded = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    out.append(rounded)
    rest = rest - rounded
  return jnp.stack(out).astype(dtype)


def read_cotangents(d_pre, dz, z, scale, alpha, bias, size):
  """From the gradients of pre, [n, t], and z to what `*_backward` reads.

  Returns:
    pre, slope = s, d_raw, d_alpha and d_bias, where dL/dx' = pre_i dh + s x'_i
    + d_raw phi_i^T; `size` is n d.
  """
  n = len(d_pre)
  weights = jax.nn.sigmoid(alpha * z[:n] + bias[:, None])
  d_logits = d_pre * weights * (1 - weights)
  dz = dz.at[:n].add(alpha * d_logits)
  slope = -(scale**2) * jnp.sum(dz * z, axis=0) / size
  d_alpha, d_bias = jnp.sum(d_logits * z[:n]), jnp.sum(d_logits, axis=1)
  return weights, slope, dz * scale[None], d_alpha, d_bias


# Launches, one a kernel.


def pre_forward(x, phi, norm_eps):
  t, _, d = x.shape
  return _launch(
    stream_forward.pre_forward,
    x,
    [_shape(x, t, d), _shape(phi, phi.shape[1], t), _shape(phi, t)],
    norm_eps=norm_eps,
    **_projection(phi, x),
  )


def advance_forward(x, phi, norm_eps):
  t, _, d = x.shape
  outputs = [_shape(x, t, d), _shape(phi, phi.shape[1], t), _shape(phi, t)]
  return _launch(
    stream_forward.advance_forward,
    x,
    [_shape(x, *x.shape), *outputs],
    norm_eps=norm_eps,
    **_projection(phi, x),
  )


def post_forward(x):
  return _launch(
    stream_forward.post_forward, x, [_shape(x, *x.shape)], by_channels=True
  )


def collapse_forward(x):
  t, _, d = x.shape
  return _launch(
    stream_forward.collapse_forward, x, [_shape(x, t, d)], by_channels=True
  )


def pre_dots(x):
  t, n, _ = x.shape
  outputs = [jax.ShapeDtypeStruct((n, t), jnp.float32)]
  return _launch(stream_backward.pre_dots, x, outputs)


def advance_dots(x):
  t, n, _ = x.shape
  outputs = [jax.ShapeDtypeStruct((n, t), jnp.float32)]
  return _launch(stream_backward.advance_dots, x, outputs)


def collapse_backward(x):
  t, n, d = x.shape
  dots = jax.ShapeDtypeStruct((n + 1, t), jnp.float32)
  outputs = [_shape(x, *x.shape), _shape(x, t, d), dots]
  return _launch(stream_backward.collapse_backward, x, outputs)


def post_backward(x):
  t, n, d = x.shape
  d_mix = jax.ShapeDtypeStruct((n, n + 1, t), jnp.float32)
  outputs = [_shape(x, *x.shape), _shape(x, t, d), d_mix]
  return _launch(stream_backward.post_backward, x, outputs)


def pre_backward(x, phi):
  return _launch_parts(
    stream_backward.pre_backward, x, phi, [_shape(x, *x.shape)]
  )


def advance_backward(x, phi):
  t, n, d = x.shape
  num = _projection(phi, x)['K']
  channels = _blocks('advance_backward', n, num)[1]
  d_mix = _shape(phi, d // channels, t, n * (n + 1))
  outputs = [_shape(x, *x.shape), _shape(x, t, d), d_mix]
  return _launch_parts(
    stream_backward.advance_backward,
    x,
    phi,
    outputs,
    MIX=triton.next_power_of_2(n * (n + 1)),
  )


def _blocks(name, n, num):
  wide = n > 4 or n * num > 128
  return (WIDE_BLOCKS if wide else BLOCKS)[name]


def _shape(like, *shape):
  return jax.ShapeDtypeStruct(shape, like.dtype)


def _projection(phi, x):
  num = phi.shape[1]
  return {
    'NUM': num,
    'K': max(16, triton.next_power_of_2(num)),
    'PARTS': 1 if x.dtype == jnp.float32 else 3,
  }


def _launch(kernel, x, outputs, by_channels=False, **constants):
  """A program a block of tokens, or one a block of tokens and channels."""
  t, n, d = x.shape
  tokens, channels, num_warps, num_stages = _blocks(
    kernel.__name__, n, constants.get('K', 0)
  )
  grid = (triton.cdiv(t, tokens),)
  if by_channels:
    grid = (*grid, d // channels)
  constants |= {'num_tokens': t, 'N': n, 'D': d, 'T': tokens, 'C': channels}
  return launch.Launch(
    kernel, grid, tuple(outputs), constants, num_warps, num_stages
  )


def _launch_parts(kernel, x, phi, outputs, **constants):
  """A program a block of channels and a part of the tokens."""
  t, n, d = x.shape
  constants |= _projection(phi, x)
  tokens, channels, num_warps, num_stages = _blocks(
    kernel.__name__, n, constants['K']
  )
  blocks = d // channels
  tiles = triton.cdiv(t, tokens)
  tiles_of_part = triton.cdiv(tiles, max(1, PROGRAMS // blocks))
  num_parts = triton.cdiv(tiles, tiles_of_part)
  constants |= {
    'num_tokens': t,
    'tokens_of_part': tiles_of_part * tokens,
    'N': n,
    'D': d,
    'T': tokens,
    'C': channels,
  }
  d_phi = _shape(phi, num_parts, phi.shape[1], n * d)
  return launch.Launch(
    kernel,
    (blocks, num_parts),
    (*outputs, d_phi),
    constants,
    num_warps,
    num_stages,
  )
