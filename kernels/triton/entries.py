"""The GPU kernels as `dispatch` calls them.

What `reference` specifies; see there and in `dispatch` for the arguments. A
call that the kernels cannot serve raises NotImplementedError with the reason.
"""

import jax
import jax.numpy as jnp

from mhc import precision
from mhc.kernels import target
from mhc.kernels.triton import launch
from mhc.kernels.triton import sinkhorn as sinkhorn_lib
from mhc.kernels.triton import streams

STREAMS = (2, 3, 4, 8)


def sinkhorn(logits, num_iters, eps):
  _check_place(logits)
  return sinkhorn_lib.sinkhorn(logits, num_iters, eps)


def pre(x, phi, alpha, bias, norm_eps):
  _check(x)
  return _marked(*streams.pre(x, phi, alpha, bias, norm_eps))


def post(x, y, post, res):
  _check(x)
  return precision.mark('streams', streams.post(x, y, post, _matrix(post, res)))


def advance(x, y, post, res, phi, alpha, bias, norm_eps):
  _check(x)
  x, h, z = streams.advance(
    x, y, post, _matrix(post, res), phi, alpha, bias, norm_eps
  )
  return precision.mark('streams', x), *_marked(h, z)


def collapse(x, y, post, res):
  _check(x)
  return streams.collapse(x, y, post, _matrix(post, res))


def _marked(h, z):
  h = precision.mark('sublayer_input', h)
  return h, precision.mark('mapping_logits', z)


def _matrix(post, res):
  if res is None:
    eye = jnp.eye(len(post))[..., None]
    return jnp.broadcast_to(eye, (len(post), *post.shape))
  return res


def _check(x):
  check(x)
  _check_place(x)


def check(x):
  """Raises NotImplementedError if the kernels cannot serve streams x."""
  _, n, dim = x.shape
  if n not in STREAMS:
    raise NotImplementedError(f'{n} streams: the kernels take {STREAMS}')
  if dim % 128:
    raise NotImplementedError(
      f'streams of width {dim}: the kernels take multiples of 128'
    )
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'{x.dtype} streams: bfloat16 or float32')


def _check_place(x):
  if target.platform() != 'gpu' and not launch.interpreted():
    raise NotImplementedError(
      f'the GPU kernels were asked for on {target.platform()}'
    )
  if jax.typeof(x).mat.varying:
    raise NotImplementedError(
      'calls of GPU kernels do not carry axes of a mesh: give the shard_map '
      'around them check_vma=False'
    )
