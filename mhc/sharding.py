"""The mesh and how arrays lie on it.

One axis so far: `data` splits the batch; parameters and optimiser state are
whole on every device.
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

DATA = 'data'
BATCH = PartitionSpec(DATA)
WHOLE = PartitionSpec()


def make_mesh(
  num_devices: int,
  data: config_lib.DataConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of `num_devices`, or with 0 of the most that divide the batch.

  Args:
    num_devices: how many, 0 to choose.
    data: the batch that they share.
    devices: to take them from, by default all that JAX sees.

  Raises:
    ValueError: fewer devices exist, or the batch does not divide over them, or
      a device's share not into microbatches.
  """
  devices = list(devices or jax.devices())
  if num_devices == 0:
    divisors = [
      d for d in range(1, len(devices) + 1) if data.batch_size % d == 0
    ]
    num_devices = divisors[-1]
  if num_devices > len(devices):
    raise ValueError(
      f'num_devices={num_devices}, but there are {len(devices)} '
      f'{devices[0].platform} device(s)'
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
    np.array(devices[:num_devices]), (DATA,), axis_types=(AxisType.Auto,)
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
