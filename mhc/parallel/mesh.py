"""The mesh and how arrays lie on it.

Three axes. `data` and `expert` split the batch. `pipe` splits the stack of
blocks into stages (`layout`), `expert` the experts of a layer. `data` splits
one dimension of every matrix of parameters, and of what the optimiser keeps for
it; the matrix is put together where it is used (`fsdp`). `spec` is the table.
"""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
import numpy as np

from mhc import axes as axes_lib
from mhc import config as config_lib
from mhc.model import experts
from mhc.pipeline import table as table_lib

P = PartitionSpec
DATA = 'data'
PIPE = 'pipe'
EXPERT = experts.AXIS
AXES = (DATA, PIPE, EXPERT)
BATCH = P((DATA, EXPERT))
WHOLE = P()
ROWS = P(PIPE)  # of the stack of blocks
# A pipeline's table is written out.
MOST_MICROBATCHES = 2**14


def spec(
  path: tuple[str, ...], stack: str = 'moe_blocks', head: str = 'last'
) -> PartitionSpec:
  """How a parameter, or its optimiser state, lies.

  Args:
    path: its names in the tree, from the root.
    stack: the blocks that a pipeline is cut from; all of its devices have the
      others.
    head: 'vocab' splits the logits' matrix over PIPE too.
  """
  match path:
    case (*_, 'moe_blocks', 'ffn', 'gate' | 'up' | 'down'):
      return P(PIPE, EXPERT, DATA)
    case (*_, 'embed', 'table'):
      return P(None, DATA)
    case (*_, 'head', 'weight'):
      return P(DATA, PIPE) if head == 'vocab' else P(DATA)
    case ('router_bias',):
      return P(PIPE)
  split = DATA if path and path[-1] in ('weight', 'phi') else None
  for blocks in ('dense_blocks', 'moe_blocks'):
    if blocks in path:
      return P(PIPE if blocks == stack else None, split)
  return P(split)


def specs(tree, mesh: Mesh, stack: str, head: str):
  """`spec` of every leaf of parameters or of a train state.

  A dimension that does not divide over its axis is not split.
  """

  def leaf(path, value):
    axes = spec(names(path), stack, head)
    return P(
      *(
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, value.shape, strict=False)
      )
    )

  return jax.tree_util.tree_map_with_path(leaf, tree)


def make_mesh(
  config: config_lib.MeshConfig,
  data: config_lib.DataConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of as many devices as asked for, see `MeshConfig`.

  Args:
    config: how many, and what they split.
    data: the batch that they share.
    devices: to take them from, by default all that JAX sees.

  Raises:
    ValueError: fewer devices exist, the batch does not divide over them, a
      device's share not into microbatches, these are too few for the
      pipeline, or some process would have no device to compute on.
  """
  processes = jax.process_count() if devices is None else 1
  devices = list(devices or jax.devices())
  model = config.pipe * config.expert
  number = config.num_devices
  if number == 0:
    fitting = [
      number
      for number in range(model, len(devices) + 1, model)
      if data.batch_size % (number // config.pipe) == 0
    ]
    number = max(fitting, default=model)
  if number > len(devices):
    raise ValueError(
      f'mesh.num_devices={number} (mesh.pipe={config.pipe}, '
      f'mesh.expert={config.expert}), but there are {len(devices)} '
      f'{devices[0].platform} device(s)'
    )
  ways = number // config.pipe
  if data.batch_size % ways:
    raise ValueError(
      f'data.batch_size={data.batch_size} does not divide over {ways} device(s)'
      f': mesh.num_devices={number} over mesh.pipe={config.pipe}'
    )
  num_microbatches(config, data, ways)
  shape = (ways // config.expert, config.pipe, config.expert)
  if devices[0].platform == 'tpu' and number == len(devices) > 1:
    # Axes onto the torus.
    array = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:
    array = np.array(devices[:number]).reshape(shape)
  if len({device.process_index for device in array.flat}) < processes:
    raise ValueError(
      f'mesh.num_devices={number} of the {len(devices)} devices are not in all '
      f'{processes} processes, which must each have one: set mesh.num_devices '
      f'and data.batch_size={data.batch_size} so that more are used'
    )
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def num_microbatches(
  config: config_lib.MeshConfig, data: config_lib.DataConfig, ways: int
) -> int:
  """Into how many parts a device takes its rows, of a batch split `ways`.

  Raises:
    ValueError: they do not come out even, or are too few or too many for the
      schedule.
  """
  share = data.batch_size // ways
  size = data.microbatch_size or share
  if share % size:
    raise ValueError(
      f'data.microbatch_size={size} does not divide a '
      f"device's share of the batch: {data.batch_size} rows over "
      f'{ways} device(s) are {share} (mesh.num_devices={ways * config.pipe} '
      f'over mesh.pipe={config.pipe})'
    )
  if size % config.parts:
    raise ValueError(
      f'mesh.parts={config.parts} does not divide the {size} row(s) of a '
      'microbatch (data.microbatch_size)'
    )
  number = share // size
  if config.pipe > 1:
    least = table_lib.minimum_microbatches(config.schedule, config.pipe)
    if number < least:
      raise ValueError(
        f'mesh.schedule={config.schedule!r} needs at least {least} '
        f'microbatches on mesh.pipe={config.pipe} devices, got {number}: '
        f'data.batch_size={data.batch_size} over {ways} device(s) are {share} '
        f'rows, data.microbatch_size={size} of them at a time'
      )
    if number > MOST_MICROBATCHES:
      raise ValueError(
        f'data.batch_size={data.batch_size} over {ways} device(s), '
        f'data.microbatch_size={size} rows at a time, are {number} '
        f'microbatches: a pipeline (mesh.pipe={config.pipe}) takes at most '
        f'{MOST_MICROBATCHES}'
      )
  return number


def schedule_of(
  config: config_lib.MeshConfig, number: int
) -> table_lib.Schedule:
  """Of the mesh's pipeline, for a device's `number` of microbatches."""
  return table_lib.build(
    config.schedule,
    config.pipe,
    number,
    num_chunks=config.chunks,
    head=config.head,
  )


def microbatches(
  tokens: Int[Array, 'b t'], data: config_lib.DataConfig
) -> Int[Array, 'm c t']:
  """A device's rows in the parts that it takes at a time."""
  size = data.microbatch_size or len(tokens)
  return tokens.reshape(-1, size, tokens.shape[1])


def place(tree, mesh: Mesh, spec: PartitionSpec):
  """Puts arrays, of which every process has the whole, onto the mesh."""
  sharding = NamedSharding(mesh, spec)

  def leaf(value):
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  return jax.tree.map(leaf, tree)


def varying(tree):
  """Inside a `shard_map`: leaves as ones that may differ on any two devices."""

  return axes_lib.vary(tree, AXES)


def names(path) -> tuple[str, ...]:
  """Of the nodes on a path into a tree, whatever kind they are."""
  keys = jax.tree_util.keystr(path, simple=True, separator='/')
  return tuple(keys.split('/'))
