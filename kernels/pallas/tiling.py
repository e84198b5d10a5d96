"""How many tokens a TPU kernel takes at a time.

The more, the fewer fixed costs a token; the limit is the vector memory of a
core, which has to hold whole rows of the streams, twice, so that the next tile
is copied while one is computed. `Pass.memory` estimates what a tile takes; the
compiler is given that as its limit, so that every compilation checks it.
"""

import dataclasses

import jax.numpy as jnp

from mhc.kernels import chips
from mhc.kernels import platform
from mhc.kernels.pallas import block_diagonal

MiB = 2**20
# What the compiler keeps for itself: spilled registers and large values.
RESERVE = 4 * MiB
TOKENS = (256, 128, 64, 32, 16)


@dataclasses.dataclass(frozen=True)
class Pass:
  """Sizes of one kernel call.

  Attributes:
    n, dim: streams and their width.
    k: numbers of the projection z, 0 where nothing is read.
    writes: whether a sub-layer's output is written back.
    dtype: of the streams.
    norm_eps: of the norm in front of the projection.
    tokens: of a tile.
  """

  n: int
  dim: int
  k: int
  writes: bool
  dtype: jnp.dtype
  norm_eps: float = 0.0
  tokens: int = TOKENS[0]

  @property
  def reads(self) -> bool:
    return self.k > 0

  @property
  def is_bfloat16(self) -> bool:
    return self.dtype == jnp.bfloat16

  @property
  def height(self) -> int:
    """Rows of z and phi in registers."""
    return block_diagonal.round_up(self.k, 8)

  @property
  def chunk(self) -> int:
    """Channels at a time."""
    sizes = range(128, min(512, self.dim) + 1, 128)
    return max(size for size in sizes if self.dim % size == 0)

  @property
  def group(self) -> int:
    """Tokens on one block of diagonals, g: B has 2 (n + 1) g lanes."""
    return self._largest(2 * (self.n + 1))

  @property
  def pair(self) -> int:
    """Tokens on one block of dx' X^T, (n + 1) g' lanes."""
    return self._largest(self.n + 1)

  def _largest(self, lanes_of_token):
    return 16 if 16 * lanes_of_token <= block_diagonal.LANES else 8

  def groups(self, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, self.tokens, size)]


def fit(
  sizes: Pass, num_tokens: int, memory, device: chips.Chip | None = None
) -> Pass:
  """`sizes` with the largest tile that fits.

  Args:
    sizes: of the call.
    num_tokens: in all; a tile is not much larger.
    memory: from a `Pass` to the bytes that it takes.
    device: the one at hand, if not given.

  Raises:
    NotImplementedError: not even the smallest fits.
  """
  limit = (device or chip()).vector_memory
  for tokens in TOKENS:
    tile = dataclasses.replace(sizes, tokens=tokens)
    useful = tokens < 2 * num_tokens or tokens == TOKENS[-1]
    if useful and memory(tile) <= limit:
      return tile
  raise NotImplementedError(
    f'{TOKENS[-1]} tokens of {sizes.n} streams of {sizes.dim} take '
    f'{memory(tile) / MiB:.0f} MiB of vector memory, there are '
    f'{limit // MiB} MiB'
  )


def chip() -> chips.Chip:
  """The TPU at hand; where there is none, as in the interpreter, a v5p."""
  kind = platform.device()[1]
  found = [chip for chip in chips.CHIPS.values() if chip.kind == kind]
  return found[0] if found else chips.CHIPS['v5p']
