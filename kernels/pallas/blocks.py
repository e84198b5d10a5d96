"""The kinds of a kernel's arrays: which block a tile of tokens takes of each.

Each kind of array knows its shape for a number of tokens, its `BlockSpec`, how
an operand is padded to whole tiles, and how a result is cut back:

    ChannelsMinor   [..., t, d]: streams, or what a sub-layer reads and returns
    TokensMinor     [..., t], float32: mappings and the projection
    Whole           an input of any shape, the same for every tile
    Summed          an output of any shape, float32: the sum over all tiles

Tokens are padded with zeros.
"""

from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from mhc.kernels.pallas import block_diagonal


class Grid(NamedTuple):
  """The tiles of a call.

  Attributes:
    num_tokens: tokens of the call.
    padded: tokens of all tiles.
    tile: tokens of one tile.
    cores: that share the tiles.
    steps: tiles of a core.
    narrow: whether a tile does not fill the lanes of registers.
  """

  num_tokens: int
  padded: int
  tile: int
  cores: int
  steps: int
  narrow: bool

  def pad(self, x: jax.Array, axis: int) -> jax.Array:
    missing = self.padded - self.num_tokens
    if not missing:
      return x
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def make_grid(num_tokens: int, tile: int, cores: int) -> Grid:
  """Deals tiles out to the cores; to one core if they do not come out even."""
  count = pl.cdiv(num_tokens, tile)
  cores = cores if count % cores == 0 else 1
  return Grid(
    num_tokens=num_tokens,
    padded=count * tile,
    tile=tile,
    cores=cores,
    steps=count // cores,
    narrow=tile % block_diagonal.LANES != 0,
  )


class ChannelsMinor(NamedTuple):
  """[..., t, d]; `leading` are the dimensions before the tokens."""

  leading: tuple[int, ...]
  dim: int
  dtype: jax.typing.DTypeLike

  def shape(self, tokens: int) -> tuple[int, ...]:
    return (*self.leading, tokens, self.dim)

  def spec(self, grid: Grid) -> pl.BlockSpec:
    zeros = (0,) * len(self.leading)
    return pl.BlockSpec(
      self.shape(grid.tile), lambda c, s: (*zeros, c * grid.steps + s, 0)
    )

  def operand(self, x: jax.Array, grid: Grid) -> jax.Array:
    return grid.pad(x, len(self.leading))

  def out_shape(self, grid: Grid) -> tuple[int, ...]:
    return self.shape(grid.padded)

  def result(self, x: jax.Array, grid: Grid) -> jax.Array:
    return x[..., : grid.num_tokens, :]


class TokensMinor(NamedTuple):
  """[..., t], float32; `leading` are the dimensions before the tokens.

  Narrow tiles lie apart in memory, [tiles, ..., tile]: a block may have fewer
  lanes than a register only where its array has as few.
  """

  leading: tuple[int, ...]
  dtype: jax.typing.DTypeLike = jnp.float32

  def shape(self, tokens: int) -> tuple[int, ...]:
    return (*self.leading, tokens)

  def spec(self, grid: Grid) -> pl.BlockSpec:
    shape = self.shape(grid.tile)
    zeros = (0,) * len(self.leading)
    if grid.narrow:
      return pl.BlockSpec(
        (None, *shape), lambda c, s: (c * grid.steps + s, *zeros, 0)
      )
    return pl.BlockSpec(shape, lambda c, s: (*zeros, c * grid.steps + s))

  def operand(self, x: jax.Array, grid: Grid) -> jax.Array:
    x = grid.pad(x, len(self.leading))
    if grid.narrow:
      x = jnp.moveaxis(x.reshape(*self.leading, -1, grid.tile), -2, 0)
    return x

  def out_shape(self, grid: Grid) -> tuple[int, ...]:
    if grid.narrow:
      return (grid.cores * grid.steps, *self.shape(grid.tile))
    return self.shape(grid.padded)

  def result(self, x: jax.Array, grid: Grid) -> jax.Array:
    if grid.narrow:
      x = jnp.moveaxis(x, 0, -2).reshape(self.shape(grid.padded))
    return x[..., : grid.num_tokens]


class Whole(NamedTuple):
  """An input that every tile reads; `value` is that of a constant."""

  dims: tuple[int, ...]
  dtype: jax.typing.DTypeLike
  value: np.ndarray | None = None

  def shape(self, tokens: int) -> tuple[int, ...]:
    del tokens
    return self.dims

  def spec(self, grid: Grid) -> pl.BlockSpec:
    del grid
    return pl.BlockSpec(self.dims, lambda c, s: (0,) * len(self.dims))

  def operand(self, x: jax.Array | None, grid: Grid) -> jax.Array:
    del grid
    return x if self.value is None else jnp.asarray(self.value)


class Summed(NamedTuple):
  """A float32 output to which every tile adds; one for each core."""

  dims: tuple[int, ...]
  dtype: jax.typing.DTypeLike = jnp.float32

  def shape(self, tokens: int) -> tuple[int, ...]:
    del tokens
    return self.dims

  def spec(self, grid: Grid) -> pl.BlockSpec:
    del grid
    return pl.BlockSpec(
      (None, *self.dims), lambda c, s: (c, *(0,) * len(self.dims))
    )

  def out_shape(self, grid: Grid) -> tuple[int, ...]:
    return (grid.cores, *self.dims)

  def result(self, x: jax.Array, grid: Grid) -> jax.Array:
    return x[0] if grid.cores == 1 else jnp.sum(x, axis=0)


Input = ChannelsMinor | TokensMinor | Whole
Output = ChannelsMinor | TokensMinor | Summed
