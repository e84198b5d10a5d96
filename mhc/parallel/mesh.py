"""The mesh, and the arithmetic of a batch that it shares.

Three axes (`axes`): `data` and `expert` split the batch, `pipe` the stack of
blocks into stages, `expert` the experts of a layer, and `data` one dimension of
every matrix. `partition` says how arrays lie on it.
"""

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jaxtyping import Array, Int
import numpy as np

from mhc import config as config_lib
from mhc.axes import AXES, DATA, EXPERT
from mhc.kernels import chips
from mhc.model import expert_parallel
from mhc.parallel import ici
from mhc.parallel import torus
from mhc.pipeline import table

# A pipeline's table is written out.
MOST_MICROBATCHES = 2**14


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
    ValueError: fewer devices exist, or more accelerators than the mesh can
      use, the batch does not divide over them, a device's share not into
      microbatches, these are too few for the pipeline, or some process would
      have no device to compute on.
  """
  processes = jax.process_count() if devices is None else 1
  devices = list(devices or jax.devices())
  shape = sizes(config, data, len(devices), devices[0].platform)
  number = math.prod(shape)
  if devices[0].platform == 'tpu' and number == len(devices) > 1:
    array = _on_torus(shape, devices)
  else:
    array = np.array(devices[:number]).reshape(shape)
  if len({device.process_index for device in array.flat}) < processes:
    raise ValueError(
      f'mesh.num_devices={number} of the {len(devices)} devices are not in all '
      f'{processes} processes, which must each have one: set mesh.num_devices '
      f'and data.batch_size={data.batch_size} so that more are used'
    )
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def _on_torus(shape, devices):
  """TPUs in the order of `torus`; in JAX's where it knows none."""
  kinds = {chip.kind: chip for chip in chips.CHIPS.values()}
  chip = kinds.get(devices[0].device_kind)
  slices = {getattr(device, 'slice_index', None) for device in devices}
  numbers = None
  if chip and len(slices) == 1:
    coords = np.array([device.coords for device in devices])
    numbers = torus.place(shape, ici.make_torus(coords, chip))
  if numbers is None:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return np.array(devices)[numbers]


def sizes(
  config: config_lib.MeshConfig,
  data: config_lib.DataConfig,
  num_devices: int,
  platform: str,
) -> tuple[int, int, int]:
  """The sizes of the axes on so many devices, which need not be there.

  Raises:
    ValueError: as `make_mesh`.
  """
  model = config.pipe * config.expert
  number = config.num_devices
  if number == 0:
    fitting = [
      number
      for number in range(model, num_devices + 1, model)
      if data.batch_size % (number // config.pipe) == 0
    ]
    number = max(fitting, default=model)
    if number < num_devices and platform != 'cpu':
      raise ValueError(
        f'mesh.pipe={config.pipe}, mesh.expert={config.expert} and '
        f'data.batch_size={data.batch_size} use {number} of the {num_devices} '
        'devices: choose others that divide them, or leave the rest idle by '
        f'mesh.num_devices={number}'
      )
  if number > num_devices:
    raise ValueError(
      f'mesh.num_devices={number} (mesh.pipe={config.pipe}, '
      f'mesh.expert={config.expert}), but there are {num_devices} '
      f'{platform} device(s)'
    )
  dp_size = number // config.pipe
  if data.batch_size % dp_size:
    raise ValueError(
      f'data.batch_size={data.batch_size} does not divide over {dp_size} '
      f'device(s): {number} devices for mesh.num_devices={config.num_devices}, '
      f'over mesh.pipe={config.pipe}'
    )
  num_microbatches(config, data, dp_size)
  return dp_size // config.expert, config.pipe, config.expert


def num_microbatches(
  config: config_lib.MeshConfig, data: config_lib.DataConfig, dp_size: int
) -> int:
  """The parts in which a device takes its rows of a batch split `dp_size` ways.

  Raises:
    ValueError: they do not come out even, or are too few or too many for the
      schedule.
  """
  share = data.batch_size // dp_size
  size = data.microbatch_size or share
  if share % size:
    raise ValueError(
      f'data.microbatch_size={size} does not divide a '
      f"device's share of the batch: {data.batch_size} rows over "
      f'{dp_size} device(s) are {share} ({dp_size * config.pipe} devices for '
      f'mesh.num_devices={config.num_devices}, over mesh.pipe={config.pipe})'
    )
  if size % config.num_sub_batches:
    raise ValueError(
      f'mesh.num_sub_batches={config.num_sub_batches} does not divide the '
      f'{size} row(s) of a microbatch (data.microbatch_size)'
    )
  number = share // size
  if config.pipe > 1:
    least = table.minimum_microbatches(config.schedule, config.pipe)
    if number < least:
      raise ValueError(
        f'mesh.schedule={config.schedule!r} needs at least {least} '
        f'microbatches on mesh.pipe={config.pipe} devices, got {number}: '
        f'data.batch_size={data.batch_size} over {dp_size} device(s) are '
        f'{share} rows, data.microbatch_size={size} of them at a time'
      )
    if number > MOST_MICROBATCHES:
      raise ValueError(
        f'data.batch_size={data.batch_size} over {dp_size} device(s), '
        f'data.microbatch_size={size} rows at a time, are {number} '
        f'microbatches: a pipeline (mesh.pipe={config.pipe}) takes at most '
        f'{MOST_MICROBATCHES}'
      )
  return number


def groups_line(config: config_lib.Config, mesh: Mesh) -> str:
  """Says what the mesh changes of what is computed; '' for nothing.

  A capacity, and the balance of the Sinkhorn router, are those of the tokens
  that a device has at a time: the same for each row would be stricter, for the
  batch a collective more in every layer.
  """
  moe, size = config.model.moe, mesh.shape[EXPERT]
  of_capacity = moe.dispatch == 'capacity'
  way = expert_parallel.transport(moe, size)
  names = [
    *["moe.dispatch='capacity'"] * of_capacity,
    *["moe.router='sinkhorn'"] * (moe.router == 'sinkhorn'),
  ]
  if not moe.num_experts or not names:
    return ''
  dp_size = mesh.shape[DATA] * size
  parts = dp_size * num_microbatches(config.mesh, config.data, dp_size)
  rows = config.data.batch_size // parts // config.mesh.num_sub_batches
  of_group = ''
  if of_capacity and size > 1 and way == 'all_gather':
    of_group = f', by a capacity {size * rows}'
  return (
    f'{" and ".join(names)}: {rows} of the {config.data.batch_size} rows of a '
    f'batch are taken together{of_group}; another mesh, data.microbatch_size '
    'or mesh.num_sub_batches trains another model'
  )


def microbatches(
  tokens: Int[Array, 'b t'], data: config_lib.DataConfig
) -> Int[Array, 'm c t']:
  """A device's rows in the parts that it takes at a time."""
  size = data.microbatch_size or len(tokens)
  return tokens.reshape(-1, size, tokens.shape[1])
