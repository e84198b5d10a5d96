"""The mesh and how arrays lie on it.

One axis so far: `data` splits the batch; parameters and optimiser state are
whole on every device.
"""

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

DATA = 'data'
BATCH = PartitionSpec(DATA)
WHOLE = PartitionSpec()


def make_mesh(num_devices: int, batch_size: int) -> Mesh:
  """A mesh of `num_devices`, or with 0 of the most that divide the batch.

  Raises:
    ValueError: fewer devices exist, or the batch does not divide over them.
  """
  available = jax.device_count()
  if num_devices == 0:
    divisors = [d for d in range(1, available + 1) if batch_size % d == 0]
    num_devices = divisors[-1]
  if num_devices > available:
    raise ValueError(
      f'num_devices={num_devices}, but JAX sees {available} '
      f'{jax.default_backend()} device(s)'
    )
  if batch_size % num_devices:
    raise ValueError(
      f'data.batch_size={batch_size} does not divide over '
      f'num_devices={num_devices}'
    )
  return jax.make_mesh(
    (num_devices,),
    (DATA,),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )


def place(tree, mesh: Mesh, spec: PartitionSpec):
  """Puts host arrays onto the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, spec))
