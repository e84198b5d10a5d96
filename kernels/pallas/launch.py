"""One call of a kernel over tiles of tokens.

Arrays are given by name with the kind of block that a tile takes of them:

    'streams'   [n, t, d]: all streams of the tile's tokens
    'tokens'    [t, d]
    'minor'     [m, t], float32: tokens minor
    'whole'     any shape, the same for every tile
    'summed'    an output of any shape, float32: the sum over all tiles

Tokens are filled up with zeros to whole tiles, whose results are dropped.
"""

from collections.abc import Callable
import math
import types
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mhc import axes
from mhc.kernels import platform
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import tiling


class Block(NamedTuple):
  """An operand or a result; `shape` is that of the whole array."""

  kind: str
  shape: tuple[int, ...]
  dtype: jnp.dtype


class Call(NamedTuple):
  """A kernel with its operands, results and scratch memory, by name.

  `work` is the number of multiplications and additions a token, for the
  compiler's schedule of what is around the kernel.
  """

  kernel: Callable
  name: str
  inputs: dict[str, Block]
  outputs: dict[str, Block]
  scratch: dict[str, tuple[tuple[int, ...], jnp.dtype]]
  work: int


def tile_shape(block: Block, tokens: int) -> tuple[int, ...]:
  """What one tile of `tokens` takes of an array."""
  match block.kind:
    case 'streams':
      return (block.shape[0], tokens, block.shape[2])
    case 'tokens':
      return (tokens, block.shape[1])
    case 'minor':
      return (*block.shape[:-1], tokens)
    case 'whole' | 'summed':
      return block.shape


def memory(call: Call, tokens: int) -> int:
  """Vector memory of a tile, bytes: blocks twice, scratch once."""
  blocks = [*call.inputs.values(), *call.outputs.values()]
  total = tiling.RESERVE + sum(
    2 * _bytes(tile_shape(block, tokens), block.dtype) for block in blocks
  )
  return total + sum(_bytes(*scratch) for scratch in call.scratch.values())


def moved(call: Call) -> int:
  """Bytes through HBM, all tiles, whole operands once."""
  blocks = [*call.inputs.values(), *call.outputs.values()]
  return sum(
    math.prod(block.shape) * jnp.dtype(block.dtype).itemsize for block in blocks
  )


def run(call: Call, arrays: dict[str, jax.Array], sizes: tiling.Pass):
  """The outputs by name."""
  num_tokens = next(
    block.shape[1] for block in call.inputs.values() if block.kind == 'streams'
  )
  tokens = sizes.tokens
  count = pl.cdiv(num_tokens, tokens)
  cores = tiling.chip().cores
  if count % cores:
    cores = 1
  steps = count // cores
  filled = count * tokens
  narrow = tokens % block_diagonal.LANES != 0
  varying = axes.over(arrays)

  def spec(block):
    shape = tile_shape(block, tokens)
    match block.kind:
      case 'streams':
        return pl.BlockSpec(shape, lambda c, s: (0, c * steps + s, 0))
      case 'tokens':
        return pl.BlockSpec(shape, lambda c, s: (c * steps + s, 0))
      case 'minor':
        zeros = (0,) * (len(shape) - 1)
        if narrow:
          return pl.BlockSpec(
            (None, *shape), lambda c, s: (c * steps + s, *zeros, 0)
          )
        return pl.BlockSpec(shape, lambda c, s: (*zeros, c * steps + s))
      case 'whole':
        return pl.BlockSpec(shape, lambda c, s: (0,) * len(shape))
      case 'summed':
        return pl.BlockSpec(
          (None, *shape), lambda c, s: (c, *(0,) * len(shape))
        )

  def enter(name):
    block, x = call.inputs[name], arrays[name]
    missing = filled - num_tokens
    if block.kind != 'whole' and missing:
      axis = {'streams': 1, 'tokens': 0, 'minor': x.ndim - 1}[block.kind]
      x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
    if block.kind == 'minor' and narrow:
      x = jnp.moveaxis(x.reshape(*x.shape[:-1], count, tokens), -2, 0)
    return axes.vary(x, varying)

  def result(block):
    match block.kind:
      case 'summed':
        shape = (cores, *block.shape)
      case 'minor' if narrow:
        shape = (count, *block.shape[:-1], tokens)
      case 'minor':
        shape = (*block.shape[:-1], filled)
      case 'streams':
        shape = (block.shape[0], filled, block.shape[2])
      case 'tokens':
        shape = (filled, block.shape[1])
    return jax.ShapeDtypeStruct(
      shape, block.dtype, manual_axis_type=jax.typeof(first).mat
    )

  def leave(block, x):
    match block.kind:
      case 'summed':
        return x[0] if cores == 1 else jnp.sum(x, axis=0)
      case 'minor':
        if narrow:
          x = jnp.moveaxis(x, 0, -2).reshape(*block.shape[:-1], filled)
        return x[..., :num_tokens]
      case 'streams':
        return x[:, :num_tokens]
      case 'tokens':
        return x[:num_tokens]

  names = [*call.inputs, *call.outputs, *call.scratch]

  def body(*references):
    by_name = dict(zip(names, references, strict=True))
    call.kernel(types.SimpleNamespace(**by_name), sizes)

  operands = [enter(name) for name in call.inputs]
  first = operands[0]
  limit = memory(call, tokens)
  results = pl.pallas_call(
    body,
    grid=(cores, steps),
    in_specs=[spec(block) for block in call.inputs.values()],
    out_specs=[spec(block) for block in call.outputs.values()],
    out_shape=[result(block) for block in call.outputs.values()],
    scratch_shapes=[pltpu.VMEM(*scratch) for scratch in call.scratch.values()],
    compiler_params=pltpu.CompilerParams(
      vmem_limit_bytes=limit,
      dimension_semantics=('parallel', 'arbitrary'),
    ),
    cost_estimate=pl.CostEstimate(
      flops=call.work * num_tokens,
      transcendentals=0,
      bytes_accessed=moved(call),
    ),
    name=call.name,
    interpret=platform.platform() != 'tpu',
  )(*operands)
  return {
    name: leave(block, x)
    for (name, block), x in zip(call.outputs.items(), results, strict=True)
  }


def _bytes(shape, dtype):
  """Of an array in vector memory, whose last dimensions are tiled (8, 128)."""
  *rest, last = shape
  if rest:
    rest[-1] = block_diagonal.round_up(rest[-1], 8)
  size = jnp.dtype(dtype).itemsize
  return (
    math.prod(rest) * block_diagonal.round_up(last, block_diagonal.LANES) * size
  )
