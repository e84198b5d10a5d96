"""Costs of the operations on TPUs, from the TPU compiler; nothing runs.

For each kernel: the bytes that it moves, by its blocks, and the bundles that
the compiler schedules for a tile, both as time per token; the larger one bounds
it. For plain JAX: the bytes that the compiled program accesses and the time
that the compiler estimates.
"""

from collections.abc import Iterator
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mhc.kernels import api
from mhc.kernels import chips
from mhc.kernels import shapes
from mhc.kernels.pallas import blocks
from mhc.kernels.pallas import launch
from mhc.kernels.pallas import sinkhorn
from mhc.kernels.pallas import specs
from mhc.planner import bundles
from mhc.planner import cost
from mhc.planner import hlo
from mhc.planner import targets

OPERATIONS = ('sinkhorn', 'pre', 'advance', 'post', 'collapse')
ITERATIONS = 20
NORM_EPS = 1e-20
HEADER = (
  f'n = {shapes.STREAMS}, {shapes.TOKENS} tokens; ns a token: of the schedule, '
  "of the kernel's bytes, and as the compiler expects of plain JAX\n\n"
  '| op | direction | C | TPU | elements / bound | schedule | HBM | of HBM '
  '| plain JAX | its bytes |\n'
  '|---|---|---:|---|---:|---:|---:|---:|---:|---:|'
)


def case(
  operation: str,
  dim: int,
  num_tokens: int = shapes.TOKENS,
  n: int = shapes.STREAMS,
  dtype=jnp.bfloat16,
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Abstract operands of an operation of `api`."""
  shape = jax.ShapeDtypeStruct
  k = 2 * n + n * n
  x = shape((num_tokens, n, dim), dtype)
  y = shape((num_tokens, dim), dtype)
  post = shape((n, num_tokens), jnp.float32)
  res = shape((n, n, num_tokens), jnp.float32)
  reading = (
    shape((n * dim, k), jnp.float32),
    shape((), jnp.float32),
    shape((n,), jnp.float32),
  )
  match operation:
    case 'sinkhorn':
      return (res,)
    case 'pre':
      return (x, *reading)
    case 'advance':
      return (x, y, post, res, *reading)
    case 'post' | 'collapse':
      return (x, y, post, res)


def run(operation, implementation, *operands):
  """Runs an operation of `api` with the measured settings."""
  return getattr(api, operation)(*operands, *static(operation), implementation)


def static(operation: str) -> tuple[int | float, ...]:
  """The arguments that are no arrays: iterations and eps, or the norm's eps."""
  return {
    'sinkhorn': (ITERATIONS, 0.0),
    'pre': (NORM_EPS,),
    'advance': (NORM_EPS,),
  }.get(operation, ())


def functions(operation, implementation, *, streams_first=True):
  """An operation forward, and forward with backward, of concrete operands.

  With `streams_first` the streams enter and leave as [n, t, d], the layout of
  the TPU kernels, so that a program holds the operation alone.
  """
  swapped = streams_first and operation != 'sinkhorn'

  def swap(x):
    return jnp.moveaxis(x, 0, 1) if x.ndim == 3 and swapped else x

  def forward(x, *rest):
    out = run(operation, implementation, swap(x), *rest)
    return jax.tree.map(lambda o: swap(o) if o.ndim == 3 else o, out)

  def both(cotangent, *operands):
    out, pull_back = jax.vjp(forward, *operands)
    return out, pull_back(cotangent)

  return forward, both


def programs(operation, operands, generation, implementation):
  """Lowers forward, and forward with backward, for one device."""
  devices = targets.devices(chips.CHIPS[generation].topology)[:1]
  mesh = Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))
  forward, both = functions(operation, implementation)
  x, *rest = operands
  if operation != 'sinkhorn':
    x = jax.ShapeDtypeStruct((x.shape[1], x.shape[0], x.shape[2]), x.dtype)
  replicated = PartitionSpec()
  operands = (x, *rest)
  cotangent = jax.eval_shape(forward, *operands)

  def lower(function, *arguments):
    arguments = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=NamedSharding(mesh, replicated)
      ),
      arguments,
    )
    return jax.jit(
      jax.shard_map(
        function, mesh=mesh, in_specs=replicated, out_specs=replicated
      )
    ).lower(*arguments)

  return lower(forward, *operands), lower(both, cotangent, *operands)


def elements_per_token(call: specs.Call) -> int:
  """Counts elements of streams and of sub-layer inputs and outputs."""
  arrays = [*call.inputs.values(), *call.outputs.values()]
  return sum(
    math.prod(array.shape(1))
    for array in arrays
    if isinstance(array, blocks.ChannelsMinor)
  )


def lower_bound(operation: str, direction: str, n: int, dim: int) -> int:
  """The least elements per token that an operation must move."""
  forward, backward = {
    'sinkhorn': (2 * n * n, 3 * n * n),
    'pre': ((n + 1) * dim, (2 * n + 1) * dim),
    'advance': ((2 * n + 2) * dim, (3 * n + 3) * dim),
    'post': ((2 * n + 1) * dim, (3 * n + 2) * dim),
    'collapse': ((n + 2) * dim, (2 * n + 3) * dim),
  }[operation]
  return forward if direction == 'forward' else backward


def hbm_ns_per_token(
  operation: str, direction: str, dim: int, generation: str
) -> float:
  """Nanoseconds that a kernel's bytes take on a TPU, for each token."""
  *_, moved = _blocks(operation, direction, dim, generation)
  return 1e9 * moved / chips.CHIPS[generation].bandwidth


def rows(
  operations, widths, generations, folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Yields one row per operation, width, generation and direction.

  Args:
    operations: some of `OPERATIONS`.
    widths: C.
    generations: some of `chips.CHIPS`.
    folder: from `bundles.folder`, called before this.
  """
  for operation in operations:
    for dim in widths[:1] if operation == 'sinkhorn' else widths:
      for generation in generations:
        yield from _both_directions(operation, dim, generation, folder)


def scheduled(
  operation: str, dim: int, generation: str, folder: pathlib.Path
) -> dict[str, int]:
  """Compiles the kernels of an operation: bundles of a tile by direction."""
  _, kernel = programs(operation, case(operation, dim), generation, None)
  kernel.compile()
  counts = {
    direction: bundles.bundles(folder, f'{operation}_{direction}')
    for direction in ('forward', 'backward')
  }
  bundles.empty(folder)
  return counts


def schedule_ns_per_token(
  operation: str, direction: str, dim: int, generation: str, count: int
) -> float:
  """Nanoseconds a token of a kernel whose tile has `count` bundles."""
  chip = chips.CHIPS[generation]
  tokens, *_ = _blocks(operation, direction, dim, generation)
  return 1e9 * count / tokens / chip.clock / chip.cores


def _both_directions(operation, dim, generation, folder):
  chip = chips.CHIPS[generation]
  operands = case(operation, dim)
  counts = scheduled(operation, dim, generation, folder)
  plain = [
    program.compile()
    for program in programs(operation, operands, generation, 'xla')
  ]
  bundles.empty(folder)
  accessed = [p.cost_analysis()['bytes accessed'] for p in plain]
  seconds = [
    cost.Costs(hlo.parse(p.as_text()), chip).entry.middle for p in plain
  ]
  for direction in ('forward', 'backward'):
    tokens, elements, moved = _blocks(operation, direction, dim, generation)
    spent = schedule_ns_per_token(
      operation, direction, dim, generation, counts[direction]
    )
    hbm = hbm_ns_per_token(operation, direction, dim, generation)
    back = direction == 'backward'
    yield {
      'op': operation,
      'direction': direction,
      'C': dim,
      'n': shapes.STREAMS,
      'dtype': 'float32' if operation == 'sinkhorn' else 'bfloat16',
      'generation': generation,
      'tile_tokens': tokens,
      'bundles_per_tile': counts[direction],
      'elements_per_token': elements,
      'lower_bound_elements_per_token': lower_bound(
        operation, direction, shapes.STREAMS, dim
      ),
      'bytes_per_token': moved,
      'schedule_ns_per_token': spent,
      'hbm_ns_per_token': hbm,
      'bound': 'memory' if hbm >= spent else 'schedule',
      'xla_bytes_per_token': (
        accessed[1] - accessed[0] if back else accessed[0]
      )
      / shapes.TOKENS,
      'xla_ns_per_token': 1e9
      * (seconds[1] - seconds[0] if back else seconds[0])
      / shapes.TOKENS,
    }


def _blocks(operation, direction, dim, generation):
  """Tokens per tile, elements and bytes per token."""
  n, num_tokens = shapes.STREAMS, shapes.TOKENS
  if operation == 'sinkhorn':
    elements = lower_bound(operation, direction, n, dim)
    return sinkhorn.TOKENS, elements, 4 * elements
  chip = chips.CHIPS[generation]
  reads = operation in ('pre', 'advance')
  sizes = specs.make_sizes(
    n,
    dim,
    2 * n + n * n if reads else 0,
    operation != 'pre',
    jnp.dtype(jnp.bfloat16),
    NORM_EPS,
    chip.matrix_unit,
  )
  make = {
    ('collapse', 'forward'): specs.collapse,
    ('collapse', 'backward'): specs.collapse_backward,
  }.get((operation, direction), getattr(specs, direction))
  call = launch.largest(make, sizes, num_tokens, chip)
  return (
    call.sizes.tokens,
    elements_per_token(call),
    launch.moved(call, num_tokens) / num_tokens,
  )


def line(row: dict[str, Any]) -> str:
  """A row of `rows` under `HEADER`."""
  elements = row['elements_per_token']
  bound = elements / row['lower_bound_elements_per_token']
  spent, hbm = row['schedule_ns_per_token'], row['hbm_ns_per_token']
  return (
    f'| {row["op"]} | {row["direction"]} | {row["C"]} | {row["generation"]} '
    f'| {elements} / {bound:.2f} | {spent:.1f} | {hbm:.1f} '
    f'| {spent / hbm:.2f} | {row["xla_ns_per_token"]:.1f} '
    f'| {row["xla_bytes_per_token"] / row["bytes_per_token"]:.1f}x |'
  )
