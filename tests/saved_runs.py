"""Folders of runs that were never trained: random numbers as a checkpoint."""

import functools

import jax
import numpy as np

from mhc import config
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.training import checkpoint
from mhc.training import step
from mhc.training import workdir as workdir_lib


@functools.lru_cache
def random_state(model, seed=0):
  """Of a run of `model`, every number another."""
  settings = config.Config(model=model, mesh=config.MeshConfig(num_devices=1))
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data)
  abstract = step.Step(Placement(settings, mesh)).saved_state
  rng = np.random.default_rng(seed)

  def leaf(like):
    values = (0.5 * rng.normal(size=like.shape)).astype(like.dtype)
    return jax.device_put(values, like.sharding)

  return settings, jax.tree.map(leaf, abstract)._replace(
    step=jax.device_put(np.int32(7), abstract.step.sharding)
  )


def save_run(workdir, model, seed=0):
  """A run's folder with the random state as its checkpoint."""
  settings, state = random_state(model, seed)
  workdir_lib.initialize(workdir, settings)
  with checkpoint.Checkpoints(workdir, settings) as checkpoints:
    checkpoints.save(state, {})
  return settings, state
