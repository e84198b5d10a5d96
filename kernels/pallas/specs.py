"""The declarations of the kernels: one function each, from sizes to a `Call`.

A declaration names what a kernel takes, makes and needs on chip; the kernel
finds it under these names in its `refs`. Constants that the matrix unit needs
are among the inputs. Bench and tests read bytes and memory off declarations.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhc.kernels.pallas import backward as backward_lib
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import forward as forward_lib
from mhc.kernels.pallas.blocks import ChannelsMinor
from mhc.kernels.pallas.blocks import Input
from mhc.kernels.pallas.blocks import Output
from mhc.kernels.pallas.blocks import Summed
from mhc.kernels.pallas.blocks import TokensMinor
from mhc.kernels.pallas.blocks import Whole

F32 = jnp.float32
BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of one kernel call, see `make_sizes`.

  Attributes:
    n: streams.
    dim: channels of a stream, d.
    k: rows of the projection z, 0 where nothing is read.
    writes: whether a sub-layer's output is written back.
    reads: whether the next sub-layer's input is read.
    dtype: of the streams.
    is_bfloat16: whether that is bfloat16.
    norm_eps: of the norm in front of the projection.
    padded_rows: k, filled up to whole registers.
    channel_block: channels of a step.
    fwd_group: tokens on one block of diagonals, g: B has 2 (n + 1) g lanes.
    bwd_group: tokens on one block of dx' X^T, which has (n + 1) g lanes.
    tokens: of a tile, chosen by `launch`.
    interpret: whether it runs in an interpreter, set by `launch`.
  """

  n: int
  dim: int
  k: int
  writes: bool
  reads: bool
  dtype: jax.typing.DTypeLike
  is_bfloat16: bool
  norm_eps: float
  padded_rows: int
  channel_block: int
  fwd_group: int
  bwd_group: int
  tokens: int = 256
  interpret: bool = False


def make_sizes(
  n: int,
  dim: int,
  k: int,
  writes: bool,
  dtype: jax.typing.DTypeLike,
  norm_eps: float = 0.0,
  unit: int = 128,
) -> Sizes:
  """Derives all sizes from those of an operation's operands.

  Args:
    n, dim, k, writes, dtype, norm_eps: see `Sizes`.
    unit: rows of the chip's matrix unit, as many lanes as B has at best.

  Returns:
    The sizes. Groups have 16 tokens, whole registers of bfloat16, where their
    block of diagonals fits the unit; 8 elsewhere.
  """

  def group(lanes_of_token, most):
    return 16 if 16 * lanes_of_token <= most else 8

  return Sizes(
    n=n,
    dim=dim,
    k=k,
    writes=writes,
    reads=k > 0,
    dtype=dtype,
    is_bfloat16=dtype == BF16,
    norm_eps=norm_eps,
    padded_rows=block_diagonal.round_up(k, 8),
    channel_block=_channel_block(dim, dtype),
    fwd_group=group(2 * (n + 1), unit),
    bwd_group=group(n + 1, block_diagonal.LANES),
  )


def _channel_block(dim: int, dtype: jax.typing.DTypeLike) -> int:
  """All channels of narrow bfloat16 streams: what a step costs is paid once.

  Others go in steps: more than 1,280 channels take minutes to compile, and
  float32 products at the highest precision take memory.
  """
  steps = (512, 384, 256, 128)
  if dtype == BF16:
    steps = (dim, *steps) if dim <= 1280 else (512, 640, *steps)
  return next(step for step in steps if dim % step == 0)


class Call(NamedTuple):
  """The declaration of one kernel.

  Attributes:
    kernel: takes `refs`, references by name, and `sizes`.
    name: of the kernel in compiled programs.
    sizes: of the call.
    inputs, outputs: kinds of the arrays in HBM, by name.
    scratch: shapes and dtypes by name.
    work: multiplications and additions a token, for the compiler's schedule of
      what is around the kernel.
  """

  kernel: Callable
  name: str
  sizes: Sizes
  inputs: dict[str, Input]
  outputs: dict[str, Output]
  scratch: dict[str, tuple[tuple[int, ...], jax.typing.DTypeLike]]
  work: int


def forward(sizes: Sizes) -> Call:
  """Declares `advance`, `pre` (writes nothing) or `post` (reads nothing)."""
  n, k, dim, tokens = sizes.n, sizes.k, sizes.dim, sizes.tokens
  inputs = {'x': _streams(sizes)}
  outputs, scratch = {}, {}
  work = 0
  if sizes.writes:
    inputs |= _written(sizes) | {'to_mix': _constants(sizes)['to_mix']}
    outputs['x_next'] = _streams(sizes)
    scratch['mix'] = _matrices(sizes, n, n + 1)
    work += 2 * n * (n + 1) * dim
  if sizes.reads:
    inputs |= _reading(sizes)
    outputs |= {
      'h': _layer(sizes),
      'z': TokensMinor((k,)),
      'scale': TokensMinor((1,)),
    }
    scratch |= {
      'squares': ((tokens, block_diagonal.LANES), F32),
      'product': ((_parts(sizes, 3) * sizes.padded_rows, tokens), F32),
      'spread': _lanes(sizes, n),
    }
    work += 2 * n * (k + 2) * dim
  return Call(
    forward_lib.kernel,
    f'{_operation(sizes)}_forward',
    sizes,
    inputs,
    outputs,
    scratch,
    work,
  )


def backward(sizes: Sizes) -> Call:
  """Declares the gradients of `forward`."""
  n, k, dim, tokens = sizes.n, sizes.k, sizes.dim, sizes.tokens
  constants = _constants(sizes)
  inputs = {'x': _streams(sizes)}
  outputs = {'dx': _streams(sizes)}
  scratch = {}
  work = 0
  if sizes.writes:
    inputs |= _written(sizes) | {
      'dx_next': _streams(sizes),
      'to_mix_back': constants['to_mix_back'],
      'to_sum': constants['to_sum'],
    }
    outputs |= {
      'dy': _layer(sizes),
      'd_mix': TokensMinor((n, block_diagonal.round_up(n + 1, 8))),
    }
    group = sizes.bwd_group
    scratch |= {
      'mix_back': _matrices(sizes, n + 1, n),
      'products': ((tokens // group, n * group, (n + 1) * group), F32),
    }
    work += 4 * n * (n + 1) * dim
  if sizes.reads:
    inputs |= _reading(sizes) | {
      'dh': _layer(sizes),
      'z': TokensMinor((k,)),
      'dz': TokensMinor((k,)),
      'scale': TokensMinor((1,)),
    }
    outputs |= {
      'd_logits': TokensMinor((n,)),
      'dphi': Summed((sizes.padded_rows, n * dim)),
    }
    scratch |= {
      'dots': _lanes(sizes, n),
      'spread': _lanes(sizes, n + 1),
      'd_product': (
        (_parts(sizes, 2) * sizes.padded_rows, tokens),
        _unit_dtype(sizes),
      ),
    }
    work += 4 * n * (k + 4) * dim
  if sizes.reads and sizes.writes:
    inputs['to_mix'] = constants['to_mix']
    scratch |= {
      'mix': _matrices(sizes, n, n + 1),
      'x_next': ((n, tokens, dim), sizes.dtype),
      'total': ((n, tokens, sizes.channel_block), sizes.dtype),
    }
    work += 2 * n * (n + 1) * dim
  return Call(
    backward_lib.kernel,
    f'{_operation(sizes)}_backward',
    sizes,
    inputs,
    outputs,
    scratch,
    work,
  )


def collapse(sizes: Sizes) -> Call:
  """Declares `collapse`."""
  return Call(
    forward_lib.collapse,
    'collapse_forward',
    sizes,
    inputs={'x': _streams(sizes)} | _written(sizes),
    outputs={'h': _layer(sizes)},
    scratch={'spread': _lanes(sizes, sizes.n + 1)},
    work=2 * (sizes.n + 1) * sizes.dim,
  )


def collapse_backward(sizes: Sizes) -> Call:
  """Declares the gradients of `collapse`."""
  return Call(
    backward_lib.collapse,
    'collapse_backward',
    sizes,
    inputs={'x': _streams(sizes), **_written(sizes), 'dh': _layer(sizes)},
    outputs={
      'dx': _streams(sizes),
      'dy': _layer(sizes),
      'u': TokensMinor((sizes.n + 1,)),
    },
    scratch={
      'spread': _lanes(sizes, sizes.n + 1),
      'dots': _lanes(sizes, sizes.n + 1),
    },
    work=3 * (sizes.n + 1) * sizes.dim,
  )


def _operation(sizes):
  if not sizes.reads:
    return 'post'
  return 'advance' if sizes.writes else 'pre'


def _constants(sizes):
  """Returns the inputs that scatter and gather coefficients."""
  return {
    name: Whole(array.shape, array.dtype, array)
    for name, array in _constant_arrays(
      sizes.n, sizes.dtype, sizes.fwd_group, sizes.bwd_group
    ).items()
  }


@functools.cache
def _constant_arrays(n, dtype, fwd_group, bwd_group):
  index = np.arange(n * n).reshape(n, n)
  index = np.concatenate([index, n * n + np.arange(n)[:, None]], axis=1)
  height = block_diagonal.round_up(n + 1, 8)
  to_sum = np.repeat(np.eye(height, n + 1), bwd_group, axis=1)
  return {
    'to_mix': block_diagonal.scatter_constants(index, fwd_group, dtype),
    'to_mix_back': block_diagonal.scatter_constants(index.T, fwd_group, dtype),
    'to_sum': to_sum.astype(BF16),
  }


def _streams(sizes):
  return ChannelsMinor((sizes.n,), sizes.dim, sizes.dtype)


def _layer(sizes):
  """Returns the kind of what a sub-layer reads and returns."""
  return ChannelsMinor((), sizes.dim, sizes.dtype)


def _written(sizes):
  return {
    'y': _layer(sizes),
    'post': TokensMinor((sizes.n,)),
    'res': TokensMinor((sizes.n * sizes.n,)),
  }


def _reading(sizes):
  shape = (_parts(sizes, 3) * sizes.padded_rows, sizes.n * sizes.dim)
  return {
    'phi': Whole(shape, _unit_dtype(sizes)),
    'gate': Whole((sizes.n, 2), F32),
  }


def _matrices(sizes, rows, columns):
  """Returns the scratch for B of all groups of a tile."""
  lanes = _parts(sizes, 2) * columns * sizes.fwd_group
  return (rows, sizes.tokens, lanes), _unit_dtype(sizes)


def _lanes(sizes, rows):
  """Returns the scratch for a register of lanes a token, [rows, t, 128]."""
  return (rows, sizes.tokens, block_diagonal.LANES), F32


def _parts(sizes, count):
  """Returns in how many bfloat16 arrays float32 enters the matrix unit."""
  return count if sizes.is_bfloat16 else 1


def _unit_dtype(sizes):
  return BF16 if sizes.is_bfloat16 else F32
