"""The TPU generations, from their public data sheets."""

from typing import NamedTuple


class Chip(NamedTuple):
  """One JAX device of a generation.

  Attributes:
    kind: JAX's name for it.
    clock: Hz; where it is not published, from the peak of the matrix units.
    flops: a second, bfloat16.
    bandwidth: bytes a second, HBM.
    vector_memory: bytes, of a core.
    cores: that share a program.
    topology: a small slice to compile for.
  """

  kind: str
  clock: float
  flops: float
  bandwidth: float
  vector_memory: int
  cores: int
  topology: str


CHIPS = {
  'v4': Chip('TPU v4', 1.05e9, 275e12, 1.228e12, 16 << 20, 2, 'v4:2x2x1'),
  'v5e': Chip('TPU v5 lite', 1.5e9, 197e12, 0.819e12, 128 << 20, 1, 'v5e:2x2'),
  'v5p': Chip('TPU v5', 1.75e9, 459e12, 2.765e12, 64 << 20, 2, 'v5p:2x2x1'),
  'v6e': Chip('TPU v6 lite', 1.75e9, 918e12, 1.64e12, 128 << 20, 1, 'v6e:2x2'),
  # Two devices a chip: half of its figures.
  'tpu7x': Chip('TPU7x', 2.2e9, 1155e12, 3.7e12, 64 << 20, 1, 'tpu7x:2x2x1'),
}
