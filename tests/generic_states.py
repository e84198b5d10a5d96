"""Parameters and states that nothing is compiled for, unlike those of `init`.

Drawing the parameters of a model takes a program of seconds. What holds for any
parameters is tested with these.
"""

from flax import nnx
import jax
import numpy as np

from mhc.model import transformer
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


def of_model(settings, seed: int = 0, moved: float = 0.2):
  """`parameters` of a model; the places of depth routing are what they are."""
  _, shapes = transformer.abstract(settings)
  filled = parameters(shapes, seed, moved)
  if not any('place' in name for name, _ in _named(shapes)):
    return filled

  @jax.jit
  def places():
    model = transformer.Transformer(settings, rngs=nnx.Rngs(0))
    named = _named(nnx.to_pure_dict(nnx.state(model)))
    return {name: leaf for name, leaf in named if 'place' in name}

  known = jax.device_get(places())
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: known.get(jax.tree_util.keystr(path), leaf), filled
  )


def _named(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def state(programs: step_lib.Step, seed: int = 0) -> state_lib.TrainState:
  """A state before the first step, on the devices of the programs."""
  shapes = programs.abstract_state
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  return jax.device_put(
    zeros._replace(params=parameters(shapes.params, seed)),
    state_lib.shardings(shapes),
  )
