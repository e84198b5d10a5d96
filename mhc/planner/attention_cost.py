"""Time of the attention kernels on TPUs, from the compiler; nothing runs."""

from collections.abc import Iterator
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np

from mhc.kernels import chips
from mhc.kernels.pallas import attention
from mhc.planner import kernel_bundles
from mhc.planner import targets


class Case(NamedTuple):
  """Whole rows of `tokens`, bfloat16; those of the paper's 27B by default."""

  heads: int = 32
  tokens: int = 4096
  keys: int = 192
  values: int = 128


def rows(
  case: Case, generation: str, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Yields the kernels of one row of a batch, forward and backward.

  Args:
    case: the sizes.
    generation: one of `chips.CHIPS`.
    folder: from `bundles.folder`, called before this.
  """
  chip = chips.CHIPS[generation]
  (device, *_) = targets.devices(chip.topology)
  mesh = Mesh(np.array([device]), ('one',), axis_types=(AxisType.Auto,))

  def both(q, k, v, d_out):
    out, log_sum = attention.forward(q, k, v, 1.0)
    return attention.backward(q, k, v, out, log_sum, d_out, 1.0)

  shapes = (case.keys, case.keys, case.values, case.values)
  with jax.set_mesh(mesh):
    jaxpr = jax.make_jaxpr(both)(
      *(
        jax.ShapeDtypeStruct((case.heads, case.tokens, size), jnp.bfloat16)
        for size in shapes
      )
    )
  sizes = attention.make_sizes(
    (case.heads, case.tokens, case.keys),
    case.values,
    jnp.dtype(jnp.bfloat16),
    chip,
  )
  for equation in kernel_bundles.kernels(jaxpr.jaxpr):
    counted = kernel_bundles.count(equation, device, chip, folder)
    tiles = math.prod(equation.params['grid_mapping'].grid)
    flops = equation.params['cost_estimate'].flops
    yield {
      'kernel': equation.params['name'],
      **case._asdict(),
      'generation': generation,
      'tile': sizes.block,
      'bundles_per_tile': counted * chip.cores / tiles,
      'schedule_ms': 1e3 * counted / chip.clock,
      'products_ms': 1e3 * flops / chip.flops,
    }


HEADER = (
  '| kernel | TPU | tile | bundles a tile | schedule, ms | products at the '
  'peak, ms |\n|---|---|---:|---:|---:|---:|'
)


def line(row: dict[str, Any]) -> str:
  """A row of a Markdown table under `HEADER`."""
  return (
    f'| {row["kernel"]} | {row["generation"]} | {row["tile"]} '
    f'| {row["bundles_per_tile"]:,.0f} | {row["schedule_ms"]:.2f} '
    f'| {row["products_ms"]:.2f} |'
  )
