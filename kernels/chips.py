"""The TPU generations, from their public data sheets.

Those are https://cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e, tpu7x). The
bandwidth of a link is that of https://jax-ml.github.io/scaling-book/tpus, a
tenth below what the data sheets' "bidirectional bandwidth per chip" gives, 2 *
ici_links * ici_bandwidth; the table lacks tpu7x, whose data sheet has the same
figure as v5p's.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """One JAX device of a generation.

  Attributes:
    kind: JAX's name for it.
    clock: Hz; where it is not published, from the peak of the matrix units.
    flops: a second, bfloat16.
    bandwidth: bytes a second, HBM.
    hbm: bytes that programs can have.
    ici_bandwidth: bytes a second of one link to a neighbour, one way.
    ici_links: of a chip, two for each dimension of its torus.
    vector_memory: bytes, of a core.
    matrix_unit: rows of a matrix unit, and columns.
    cores: that share a program.
    topology: a small slice to compile for.
  """

  kind: str
  clock: float
  flops: float
  bandwidth: float
  hbm: int
  ici_bandwidth: float
  ici_links: int
  vector_memory: int
  matrix_unit: int
  cores: int
  topology: str


CHIPS = {
  'v4': Chip(
    kind='TPU v4',
    clock=1.05e9,
    flops=275e12,
    bandwidth=1.228e12,
    hbm=32 << 30,
    ici_bandwidth=4.5e10,
    ici_links=6,
    vector_memory=16 << 20,
    matrix_unit=128,
    cores=2,
    topology='v4:2x2x1',
  ),
  'v5e': Chip(
    kind='TPU v5 lite',
    clock=1.5e9,
    flops=197e12,
    bandwidth=0.819e12,
    hbm=16 << 30,
    ici_bandwidth=4.5e10,
    ici_links=4,
    vector_memory=128 << 20,
    matrix_unit=128,
    cores=1,
    topology='v5e:2x2',
  ),
  'v5p': Chip(
    kind='TPU v5',
    clock=1.75e9,
    flops=459e12,
    bandwidth=2.765e12,
    hbm=95 << 30,
    ici_bandwidth=9e10,
    ici_links=6,
    vector_memory=64 << 20,
    matrix_unit=128,
    cores=2,
    topology='v5p:2x2x1',
  ),
  'v6e': Chip(
    kind='TPU v6 lite',
    clock=1.75e9,
    flops=918e12,
    bandwidth=1.64e12,
    hbm=32 << 30,
    ici_bandwidth=9e10,
    ici_links=4,
    vector_memory=128 << 20,
    matrix_unit=256,
    cores=1,
    topology='v6e:2x2',
  ),
  # Two devices a chip: half of its figures; its links they share.
  'tpu7x': Chip(
    kind='TPU7x',
    clock=2.2e9,
    flops=1155e12,
    bandwidth=3.7e12,
    hbm=96 << 30,
    ici_bandwidth=9e10,
    ici_links=6,
    vector_memory=64 << 20,
    matrix_unit=256,
    cores=1,
    topology='tpu7x:2x2x1',
  ),
}

# Dense bfloat16 FLOPs a second, from NVIDIA's data sheets (half of those "with
# sparsity"), by JAX's name for the device.
GPU_FLOPS = {
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA GH200 480GB': 989e12,
  'NVIDIA B200': 2250e12,
  'NVIDIA L4': 121e12,
}


def peak_flops(kind: str) -> float | None:
  """FLOPs a second of a device, bfloat16, by JAX's name; None if unknown."""
  of_tpus = {chip.kind: chip.flops for chip in CHIPS.values()}
  return (of_tpus | GPU_FLOPS).get(kind)
