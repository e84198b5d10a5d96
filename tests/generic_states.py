"""Parameters and states that nothing is compiled for, unlike those of `init`.

Drawing the parameters of a model takes a program of seconds. What holds for any
parameters is tested with these.
"""

import jax
import numpy as np

from mhc.training import state as state_lib
from mhc.training import step as step_lib


def parameters(shapes, seed: int = 0, moved: float = 0.2):
  """Vectors around 1, matrices around 0; `moved` is the standard deviation.

  Args:
    shapes: the tree of abstract parameters.
    seed: of the numbers.
    moved: how far they are from 1 and 0.
  """
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    gain = 'gain' in jax.tree_util.keystr(path)
    return (gain + moved * rng.normal(size=leaf.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def state(programs: step_lib.Step, seed: int = 0) -> state_lib.TrainState:
  """A state before the first step, on the devices of the programs."""
  shapes = programs.abstract_state
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  return jax.device_put(
    zeros._replace(params=parameters(shapes.params, seed)),
    state_lib.shardings(shapes),
  )
