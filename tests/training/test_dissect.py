"""What is replaced in a trained model, and that nothing else is."""

import dataclasses

from example_configs import TINY_RUN
from flax import nnx
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import transformer
from mhc.parallel import loss
from mhc.training import dissect
from mhc.training import state as state_lib

ROWS = np.random.default_rng(1).integers(0, 256, (5, 17), np.int32)
NAMES = (
  *('as trained', 'stream 0 := 0', 'stream 1 := 0', 'H_res := I'),
  *('H_res := mean', 'H_res := 11^T / n', 'H_res := I, upper half'),
)


def network(kind, unmoved='none', **model):
  """The graph and state of two blocks, parameters moved but those named."""
  connection = config.ConnectionConfig(kind=kind, num_streams=2)
  model = dataclasses.replace(
    TINY_RUN.model, num_blocks=2, connection=connection, **model
  )
  settings = dataclasses.replace(TINY_RUN, model=model)
  model = dissect.model_config(settings)
  graphdef, shapes = transformer.abstract(model)

  def move(path, leaf):
    name = jax.tree_util.keystr(path)
    scale = (unmoved not in name) * (5.0 if 'connection' in name else 1.0)
    return jnp.asarray(scale * leaf)

  params = jax.tree_util.tree_map_with_path(
    move, generic_states.parameters(shapes)
  )
  bias = transformer.abstract_router_bias(model)
  bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), bias)
  return graphdef, state_lib.TrainState(np.int32(0), params, None, bias)


def differences(graphdef, state):
  """To the model as trained, of each row, and the nats of that."""
  nats = dissect.dissect(graphdef, state, ROWS, 3)
  assert tuple(nats) == NAMES
  trained = nats.pop('as trained')
  return {name: values - trained for name, values in nats.items()}, trained


def test_without_mixing_only_streams_matter():
  change, _ = differences(*network('identity'))
  for name in ('H_res := I', 'H_res := mean', 'H_res := I, upper half'):
    np.testing.assert_array_equal(change[name], 0)
  for name in ('stream 0 := 0', 'stream 1 := 0', 'H_res := 11^T / n'):
    assert np.abs(change[name]).max() > 1e-4, name


def test_the_mean_of_equal_mappings_changes_nothing():
  change, _ = differences(*network('mhc', unmoved='phi'))  # phi = 0
  np.testing.assert_allclose(change['H_res := mean'], 0, atol=1e-6)
  for name in set(change) - {'H_res := mean'}:
    assert np.abs(change[name]).max() > 1e-4, name
  assert np.ptp(change['H_res := I'] - change['H_res := I, upper half']) > 0


@pytest.mark.slow
def test_single_pass_and_experts():
  """And nothing else is changed: as trained it is the model alone."""
  moe = config.MoEConfig(num_experts=4, expert_dim=8)
  graphdef, state = network('mhc_single_pass', moe=moe)
  change, trained = differences(graphdef, state)
  for name, values in change.items():
    assert np.abs(values).max() > 1e-4, name

  @jax.jit
  def alone(params, tokens):
    model = nnx.merge(graphdef, nnx.State(params))
    logits = model(tokens[:, :-1], state.router_bias)
    return loss.nats_of_rows(logits, tokens[:, 1:])

  want = alone(state.params, ROWS) / 16
  np.testing.assert_allclose(trained, want, rtol=1e-5)


@pytest.mark.parametrize(
  'kind', ['residual', 'frac', 'wide_residual', 'x0', 'attn_res', 'a.b:Mine']
)
def test_kinds_without_matrices_of_streams_are_refused(kind):
  connection = config.ConnectionConfig(kind=kind)
  model = dataclasses.replace(TINY_RUN.model, connection=connection)
  message = f"kind='{kind}' has no n x n mappings.*such as mhc"
  with pytest.raises(ValueError, match=message):
    dissect.model_config(dataclasses.replace(TINY_RUN, model=model))
