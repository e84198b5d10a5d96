"""The kernel calls: what each takes, makes and needs on chip, by name.

One function a kernel, from its sizes to a `passes.Call`. Bench and tests read
bytes and memory off these.
"""

import functools

import jax.numpy as jnp
import numpy as np

from mhc.kernels import chips
from mhc.kernels.pallas import backward as backward_lib
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import forward as forward_lib
from mhc.kernels.pallas import launch
from mhc.kernels.pallas import tiling
from mhc.kernels.pallas.launch import Block
from mhc.kernels.pallas.launch import Call
from mhc.kernels.pallas.tiling import Pass

F32 = jnp.float32
BF16 = jnp.bfloat16


def forward(p: Pass, num_tokens: int) -> Call:
  """`advance`, `pre` (writes nothing) or `post` (reads nothing)."""
  name = 'advance' if p.writes and p.reads else 'post' if p.writes else 'pre'
  inputs = {'x': _streams(p, num_tokens)}
  outputs, scratch = {}, {}
  work = 0
  if p.writes:
    inputs |= _written(p, num_tokens) | {'to_mix': _constant(p, 'to_mix')}
    outputs['x_next'] = _streams(p, num_tokens)
    scratch['mix'] = _matrices(p, p.n, p.n + 1)
    work += 2 * p.n * (p.n + 1) * p.dim
  if p.reads:
    inputs |= _reading(p)
    outputs |= {
      'h': _tokens(p, num_tokens),
      'z': _minor(p.k, num_tokens),
      'scale': _minor(1, num_tokens),
    }
    rows = 3 * p.height if p.is_bfloat16 else p.height
    scratch |= {
      'squares': ((p.tokens, block_diagonal.LANES), F32),
      'product': ((rows, p.tokens), F32),
      'spread': ((p.n, p.tokens, block_diagonal.LANES), F32),
    }
    work += 2 * p.n * (p.k + 2) * p.dim
  return Call(
    forward_lib.kernel, f'{name}_forward', inputs, outputs, scratch, work
  )


def backward(p: Pass, num_tokens: int) -> Call:
  """The gradients of `forward`."""
  name = 'advance' if p.writes and p.reads else 'post' if p.writes else 'pre'
  inputs = {'x': _streams(p, num_tokens)}
  outputs = {'dx': _streams(p, num_tokens)}
  scratch = {}
  work = 0
  if p.writes:
    width = p.pair * (p.n + 1)
    height = block_diagonal.round_up(p.n + 1, 8)
    inputs |= _written(p, num_tokens) | {
      'dx_next': _streams(p, num_tokens),
      'to_mix_back': _constant(p, 'to_mix_back'),
      'to_sum': _constant(p, 'to_sum'),
    }
    outputs |= {
      'dy': _tokens(p, num_tokens),
      'd_mix': Block('minor', (p.n, height, num_tokens), F32),
    }
    scratch |= {
      'mix_back': _matrices(p, p.n + 1, p.n),
      'products': ((p.tokens // p.pair, p.n * p.pair, width), F32),
    }
    work += 4 * p.n * (p.n + 1) * p.dim
  if p.reads:
    count = p.n + 1 if p.writes else p.n
    rows = 2 * p.height if p.is_bfloat16 else p.height
    inputs |= _reading(p) | {
      'dh': _tokens(p, num_tokens),
      'z': _minor(p.k, num_tokens),
      'dz': _minor(p.k, num_tokens),
      'scale': _minor(1, num_tokens),
    }
    outputs |= {
      'd_logits': _minor(p.n, num_tokens),
      'dphi': Block('summed', (p.height, p.n * p.dim), F32),
    }
    scratch |= {
      'dots': ((count, p.tokens, block_diagonal.LANES), F32),
      'spread': ((p.n + 1, p.tokens, block_diagonal.LANES), F32),
      'd_product': ((rows, p.tokens), BF16 if p.is_bfloat16 else F32),
    }
    work += 4 * p.n * (p.k + 4) * p.dim
  if p.reads and p.writes:
    inputs['to_mix'] = _constant(p, 'to_mix')
    scratch |= {
      'mix': _matrices(p, p.n, p.n + 1),
      'x_next': ((p.n, p.tokens, p.dim), p.dtype),
      'total': ((p.n, p.tokens, p.chunk), p.dtype),
    }
    work += 2 * p.n * (p.n + 1) * p.dim
  return Call(
    backward_lib.kernel, f'{name}_backward', inputs, outputs, scratch, work
  )


def collapse(p: Pass, num_tokens: int) -> Call:
  return Call(
    forward_lib.collapse,
    'collapse_forward',
    {'x': _streams(p, num_tokens)} | _written(p, num_tokens),
    {'h': _tokens(p, num_tokens)},
    {'spread': ((p.n + 1, p.tokens, block_diagonal.LANES), F32)},
    2 * (p.n + 1) * p.dim,
  )


def collapse_backward(p: Pass, num_tokens: int) -> Call:
  rows = (p.n + 1, p.tokens, block_diagonal.LANES)
  return Call(
    backward_lib.collapse,
    'collapse_backward',
    {
      'x': _streams(p, num_tokens),
      **_written(p, num_tokens),
      'dh': _tokens(p, num_tokens),
    },
    {
      'dx': _streams(p, num_tokens),
      'dy': _tokens(p, num_tokens),
      'u': _minor(p.n + 1, num_tokens),
    },
    {'spread': (rows, F32), 'dots': (rows, F32)},
    3 * (p.n + 1) * p.dim,
  )


def largest(
  make, sizes: Pass, num_tokens: int, chip: chips.Chip | None = None
) -> tuple[Pass, Call]:
  """The call that `make` describes with the largest tile that fits a chip."""

  def memory(tile):
    return launch.memory(make(tile, num_tokens), tile.tokens)

  sizes = tiling.fit(sizes, num_tokens, memory, chip)
  return sizes, make(sizes, num_tokens)


@functools.cache
def constants(p: Pass) -> dict[str, np.ndarray]:
  """What the matrix unit needs to spread and to gather coefficients."""
  n = p.n
  index = np.arange(n * n).reshape(n, n)
  index = np.concatenate([index, n * n + np.arange(n)[:, None]], axis=1)
  height = block_diagonal.round_up(n + 1, 8)
  to_sum = np.repeat(np.eye(height, n + 1), p.pair, axis=1)
  return {
    'to_mix': block_diagonal.spreading(index, p.group, p.dtype),
    'to_mix_back': block_diagonal.spreading(index.T, p.group, p.dtype),
    'to_sum': to_sum.astype(BF16),
  }


def _constant(p, name):
  array = constants(p)[name]
  return Block('whole', array.shape, array.dtype)


def _streams(p, num_tokens):
  return Block('streams', (p.n, num_tokens, p.dim), p.dtype)


def _tokens(p, num_tokens):
  return Block('tokens', (num_tokens, p.dim), p.dtype)


def _minor(rows, num_tokens):
  return Block('minor', (rows, num_tokens), F32)


def _written(p, num_tokens):
  return {
    'y': _tokens(p, num_tokens),
    'post': _minor(p.n, num_tokens),
    'res': _minor(p.n * p.n, num_tokens),
  }


def _reading(p):
  rows = 3 * p.height if p.is_bfloat16 else p.height
  return {
    'phi': Block('whole', (rows, p.n * p.dim), BF16 if p.is_bfloat16 else F32),
    'gate': Block('whole', (p.n, 2), F32),
  }


def _matrices(p, rows, columns):
  """B of all groups of a tile."""
  apart = 2 if p.is_bfloat16 else 1
  shape = (rows, p.tokens, apart * columns * p.group)
  return shape, BF16 if p.is_bfloat16 else F32
