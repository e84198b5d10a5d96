"""Operands that kernels of every platform take, and the names of outputs."""

import jax.numpy as jnp

from mhc import precision

STREAMS = (2, 3, 4, 8)
WIDTH = 128


def check(x):
  """Raises NotImplementedError if no kernel can serve streams x, [t, n, d]."""
  t, n, dim = x.shape
  if not t:
    raise NotImplementedError('no tokens')
  if n not in STREAMS:
    raise NotImplementedError(f'{n} streams: the kernels take {STREAMS}')
  if dim % WIDTH:
    raise NotImplementedError(
      f'streams of width {dim}: the kernels take multiples of {WIDTH}'
    )
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'{x.dtype} streams: bfloat16 or float32')


def res_or_identity(post, res):
  """Returns H_res, [n, n, t], or the identity where res is None."""
  if res is None:
    eye = jnp.eye(len(post), dtype=jnp.float32)[..., None]
    return jnp.broadcast_to(eye, (len(post), *post.shape))
  return res


def named_outputs(h, z):
  """Marks h and z, the outputs of `pre` and `advance`, by name."""
  h = precision.mark('sublayer_input', h)
  return h, precision.mark('mapping_logits', z)
