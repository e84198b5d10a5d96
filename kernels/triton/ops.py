"""The GPU kernels as `api` calls them.

`reference` specifies them; see there and in `api` for the arguments. A call
that the kernels cannot serve raises NotImplementedError with the reason.
"""

from mhc import axes
from mhc import precision
from mhc.kernels import operands
from mhc.kernels import platform
from mhc.kernels.triton import launch
from mhc.kernels.triton import sinkhorn as sinkhorn_lib
from mhc.kernels.triton import streams

MOST_STREAMS = 4  # that `sinkhorn` holds in the registers of a thread


def sinkhorn(logits, num_iters, eps):
  _check_place(logits)
  if len(logits) > MOST_STREAMS:
    # Triton's pass TritonGPUCoalesce takes 1 min at n = 6, several at n = 8.
    raise NotImplementedError(
      f'the GPU kernel of the projection takes at most {MOST_STREAMS} streams, '
      f'not {len(logits)}'
    )
  return sinkhorn_lib.sinkhorn(logits, num_iters, eps)


def pre(x, phi, alpha, bias, norm_eps):
  _check(x)
  return operands.named_outputs(*streams.pre(x, phi, alpha, bias, norm_eps))


def post(x, y, post, res):
  _check(x)
  return precision.mark(
    'streams', streams.post(x, y, post, operands.res_or_identity(post, res))
  )


def advance(x, y, post, res, phi, alpha, bias, norm_eps):
  _check(x)
  x, h, z = streams.advance(
    x, y, post, operands.res_or_identity(post, res), phi, alpha, bias, norm_eps
  )
  return precision.mark('streams', x), *operands.named_outputs(h, z)


def collapse(x, y, post, res):
  _check(x)
  return streams.collapse(x, y, post, operands.res_or_identity(post, res))


def _check(x):
  operands.check(x)
  _check_place(x)


def _check_place(x):
  if platform.platform() != 'gpu' and not launch.interpreted():
    raise NotImplementedError(
      f'the GPU kernels were asked for on {platform.platform()}'
    )
  if axes.varying_axes(x):
    raise NotImplementedError(
      'calls of GPU kernels do not carry axes of a mesh: give the shard_map '
      'around them check_vma=False'
    )
