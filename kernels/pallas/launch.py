"""One call of a declared kernel, over the largest tiles of tokens that fit.

The more tokens a tile has, the fewer fixed costs a token. The limit is a core's
vector memory, which holds whole rows of the streams, twice, so that the next
tile is copied in while one is computed. `memory` estimates what a tile takes;
the compiler gets that as its limit, so that every compilation checks it.
"""

from collections.abc import Callable
import dataclasses
import math
import types

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mhc import axes
from mhc.kernels import chips
from mhc.kernels import platform
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import blocks
from mhc.kernels.pallas import specs

MiB = 2**20
# Memory that the compiler keeps for itself: spilled registers and large values.
RESERVE = 4 * MiB
TOKENS = (256, 128, 64, 32, 16)  # of a tile

Declare = Callable[[specs.Sizes], specs.Call]


def run(
  declare: Declare, sizes: specs.Sizes, arrays: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Runs a kernel of `specs` on arrays by name; returns outputs by name.

  Raises:
    NotImplementedError: not even the smallest tile fits.
  """
  here, chip = machine()
  num_tokens = arrays['x'].shape[1]
  sizes = dataclasses.replace(sizes, interpret=here != 'tpu')
  call = largest(declare, sizes, num_tokens, chip)
  grid = blocks.make_grid(num_tokens, call.sizes.tokens, chip.cores)
  operands = axes.cast_varying(
    [
      kind.operand(arrays.get(name), grid) for name, kind in call.inputs.items()
    ],
    axes.varying_axes(arrays),
  )
  results = pl.pallas_call(
    _body(call),
    grid=(grid.cores, grid.steps),
    in_specs=[kind.spec(grid) for kind in call.inputs.values()],
    out_specs=[kind.spec(grid) for kind in call.outputs.values()],
    # Inside a shard_map results differ between devices as the operands do.
    out_shape=[
      axes.struct_varying_as(operands[0], kind.out_shape(grid), kind.dtype)
      for kind in call.outputs.values()
    ],
    scratch_shapes=[pltpu.VMEM(*scratch) for scratch in call.scratch.values()],
    compiler_params=pltpu.CompilerParams(
      vmem_limit_bytes=memory(call),
      dimension_semantics=('parallel', 'arbitrary'),
    ),
    cost_estimate=pl.CostEstimate(
      flops=call.work * num_tokens,
      transcendentals=0,
      bytes_accessed=moved(call, num_tokens),
    ),
    name=call.name,
    interpret=call.sizes.interpret,
  )(*operands)
  return {
    name: kind.result(x, grid)
    for (name, kind), x in zip(call.outputs.items(), results, strict=True)
  }


def largest(
  declare: Declare, sizes: specs.Sizes, num_tokens: int, chip: chips.Chip
) -> specs.Call:
  """Declares a call with the largest tile that fits a core of the chip.

  A tile is less than twice as large as `num_tokens`, or the smallest.

  Raises:
    NotImplementedError: not even the smallest fits.
  """
  for tokens in TOKENS:
    if tokens >= 2 * num_tokens and tokens != TOKENS[-1]:
      continue
    call = declare(dataclasses.replace(sizes, tokens=tokens))
    needed = memory(call)
    if needed <= chip.vector_memory:
      return call
  raise NotImplementedError(
    f'{tokens} tokens of {sizes.n} streams of {sizes.dim} take '
    f'{needed / MiB:.0f} MiB of vector memory, there are '
    f'{chip.vector_memory // MiB} MiB'
  )


def memory(call: specs.Call) -> int:
  """Returns the bytes of vector memory: blocks twice, scratch once."""
  held = [
    (kind.shape(call.sizes.tokens), kind.dtype)
    for kind in [*call.inputs.values(), *call.outputs.values()]
  ]
  total = RESERVE
  # The last two dimensions are tiled (8, 128).
  for shape, dtype in [*held, *held, *call.scratch.values()]:
    *rest, last = shape
    if rest:
      rest[-1] = pl.cdiv(rest[-1], 8) * 8
    lanes = pl.cdiv(last, block_diagonal.LANES) * block_diagonal.LANES
    total += math.prod(rest) * lanes * jnp.dtype(dtype).itemsize
  return total


def moved(call: specs.Call, num_tokens: int) -> int:
  """Returns the bytes through HBM: all tiles, whole and summed arrays once."""
  total = 0
  for kind in [*call.inputs.values(), *call.outputs.values()]:
    total += math.prod(kind.shape(num_tokens)) * jnp.dtype(kind.dtype).itemsize
  return total


def _body(call):
  """Returns the kernel as a function of references by position."""
  names = [*call.inputs, *call.outputs, *call.scratch]

  def body(*refs):
    by_name = dict(zip(names, refs, strict=True))
    call.kernel(types.SimpleNamespace(**by_name), call.sizes)

  return body


def machine():
  """Returns the platform and its chip; off TPUs, as when interpreted, a v5p."""
  machine, kind = platform.device()
  found = [chip for chip in chips.CHIPS.values() if chip.kind == kind]
  return machine, found[0] if found else chips.CHIPS['v5p']
