"""The rows of a batch that a process needs: those of its own devices."""

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from mhc import config
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition

BATCH = 16


@pytest.fixture(
  params=[{}, {'pipe': 2}, {'expert': 4}, {'pipe': 4, 'expert': 2}]
)
def mesh(request):
  data = config.DataConfig(batch_size=BATCH)
  return mesh_lib.make_mesh(config.MeshConfig(**request.param), data)


@pytest.fixture
def seen_by(monkeypatch):
  """Restricts what a process sees to its devices, of all eight."""

  def restrict(devices):
    every = NamedSharding.devices_indices_map
    monkeypatch.setattr(
      NamedSharding,
      'addressable_devices_indices_map',
      lambda self, shape: {
        device: index
        for device, index in every(self, shape).items()
        if device in devices
      },
    )

  return restrict


@pytest.mark.parametrize('number', [1, 2, 4])
def test_processes_share_out_the_rows(mesh, seen_by, number):
  """Together they have all; those of one stage's copies have the same."""
  devices = mesh.devices.reshape(-1)
  met = []
  for mine in np.split(np.array(devices), number):
    seen_by(list(mine))
    met.append(partition.rows_here(BATCH, mesh))
  assert sorted(set().union(*met)) == list(range(BATCH))
  spec = NamedSharding(mesh, partition.BATCH)
  copies = len(devices) * spec.shard_shape((BATCH,))[0] // BATCH
  assert sum(map(len, met)) <= BATCH * copies
  if number == 1:
    assert met == [list(range(BATCH))]


def test_the_rows_of_a_process_are_put_where_they_belong(
  mesh, seen_by, monkeypatch
):
  whole = np.arange(BATCH * 3).reshape(BATCH, 3)
  devices = list(mesh.devices.reshape(-1))[2:6]
  seen_by(devices)
  numbers = partition.rows_here(BATCH, mesh)
  asked = []

  def callback(shape, sharding, part):
    for index in sharding.addressable_devices_indices_map(shape).values():
      np.testing.assert_array_equal(part(index), whole[index])
      asked.append(index)
    return jax.numpy.zeros(shape)

  monkeypatch.setattr(jax, 'make_array_from_callback', callback)
  partition.put_rows(whole[numbers], numbers, BATCH, mesh)
  assert len(asked) == 4
