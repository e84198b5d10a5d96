"""The mesh and how arrays lie on it.

Two axes split the batch, `data` and `expert`; the second also splits the
experts of a layer. Every other parameter, and its state in the optimiser, is
whole on every device. `spec` is the table.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
import numpy as np

from mhc import config as config_lib
from mhc import experts

DATA = 'data'
EXPERT = experts.AXIS
AXES = (DATA, EXPERT)
BATCH = PartitionSpec(AXES)
WHOLE = PartitionSpec()
# Stacked over layers, then over experts.
EXPERTS = PartitionSpec(None, EXPERT)


def spec(path: tuple[str, ...]) -> PartitionSpec:
  """How a parameter, or its optimiser state, lies; its path in the tree."""
  match path:
    case (*_, 'moe_blocks', 'ffn', 'gate' | 'up' | 'down'):
      return EXPERTS
  return WHOLE


def specs(tree):
  """`spec` of every leaf of parameters or of a train state."""

  def leaf(path, _):
    return spec(tuple(str(_key(entry)) for entry in path))

  return jax.tree_util.tree_map_with_path(leaf, tree)


def make_mesh(
  num_devices: int,
  data: config_lib.DataConfig,
  num_expert_shards: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of `num_devices`, or with 0 of the most that divide the batch.

  Args:
    num_devices: how many, 0 to choose.
    data: the batch that they share.
    num_expert_shards: devices that split the experts of a layer.
    devices: to take them from, by default all that JAX sees.

  Raises:
    ValueError: fewer devices exist, they do not divide into shards, or the
      batch does not divide over them, or a device's share not into
      microbatches.
  """
  devices = list(devices or jax.devices())
  if num_devices == 0:
    fitting = [
      number
      for number in range(1, len(devices) + 1)
      if data.batch_size % number == 0 and number % num_expert_shards == 0
    ]
    num_devices = max(fitting, default=num_expert_shards)
  if num_devices > len(devices):
    raise ValueError(
      f'num_devices={num_devices} with num_expert_shards={num_expert_shards}, '
      f'but there are {len(devices)} {devices[0].platform} device(s)'
    )
  if num_devices % num_expert_shards:
    raise ValueError(
      f'num_devices={num_devices} does not divide into '
      f'num_expert_shards={num_expert_shards}'
    )
  if data.batch_size % num_devices:
    raise ValueError(
      f'data.batch_size={data.batch_size} does not divide over '
      f'num_devices={num_devices}'
    )
  share = data.batch_size // num_devices
  if data.microbatch_size and share % data.microbatch_size:
    raise ValueError(
      f'data.microbatch_size={data.microbatch_size} does not divide a '
      f"device's share of the batch: {data.batch_size} rows over "
      f'{num_devices} device(s) are {share}'
    )
  return Mesh(
    np.array(devices[:num_devices]).reshape(-1, num_expert_shards),
    AXES,
    axis_types=(AxisType.Auto,) * 2,
  )


def microbatches(
  tokens: Int[Array, 'b t'], data: config_lib.DataConfig
) -> Int[Array, 'm c t']:
  """A device's rows in the parts that it takes at a time."""
  size = data.microbatch_size or len(tokens)
  return tokens.reshape(-1, size, tokens.shape[1])


def place(tree, mesh: Mesh, spec: PartitionSpec):
  """Puts host arrays onto the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, spec))


def _key(entry):
  """The name in an entry of a tree's path, whatever kind of node it is in."""
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return getattr(entry, attribute)
  raise AssertionError(entry)
