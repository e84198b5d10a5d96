"""What is replaced in a trained model, and that nothing else is."""

import dataclasses

from example_configs import TINY_RUN
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import transformer
from mhc.parallel import loss
from mhc.training import dissect
from mhc.training import state as state_lib

NAMES = (
  *('as trained', 'stream 0 := 0', 'stream 1 := 0', 'H_res := I'),
  *('H_res := mean', 'H_res := 11^T / n', 'H_res := I, upper half'),
)


def dissected(kind, unmoved='none', **model):
  """The nats of 5 rows by intervention, and without `dissect`."""
  settings = dataclasses.replace(
    TINY_RUN.model,
    num_blocks=2,
    connection=config.ConnectionConfig(kind=kind, num_streams=2),
    **model,
  )
  state = state_lib.init(dataclasses.replace(TINY_RUN, model=settings), 0)
  rng = np.random.default_rng(0)

  def move(path, leaf):
    noise = rng.normal(0, 0.2, leaf.shape)
    if unmoved in jax.tree_util.keystr(path):
      return leaf
    return leaf + jnp.asarray(noise, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(move, state.params)
  graphdef, _ = transformer.abstract(
    dissect.model_config(dataclasses.replace(TINY_RUN, model=settings))
  )
  rows = rng.integers(0, 256, (5, 17), np.int32)
  nats = dissect.dissect(graphdef, state._replace(params=params), rows, 3)
  assert tuple(nats) == NAMES

  @jax.jit
  def plain(params, tokens):
    logits = nnx.merge(graphdef, nnx.State(params))(
      tokens[:, :-1], state.router_bias
    )
    return loss.nats_of_rows(logits, tokens[:, 1:]) / 16

  np.testing.assert_allclose(nats['as trained'], plain(params, rows), rtol=1e-5)
  return {name: values - nats['as trained'] for name, values in nats.items()}


def test_without_mixing_only_streams_matter():
  change = dissected('identity')
  for name in ('H_res := I', 'H_res := mean', 'H_res := I, upper half'):
    np.testing.assert_array_equal(change[name], 0)
  for name in ('stream 0 := 0', 'stream 1 := 0', 'H_res := 11^T / n'):
    assert (np.abs(change[name]) > 1e-4).all()


def test_the_mean_of_equal_mappings_changes_nothing():
  change = dissected('mhc', unmoved='phi')  # phi = 0
  np.testing.assert_allclose(change['H_res := mean'], 0, atol=1e-6)
  for name in set(NAMES) - {'as trained', 'H_res := mean'}:
    assert (np.abs(change[name]) > 1e-5).all()
  assert np.ptp(change['H_res := I'] - change['H_res := I, upper half']) > 0


def test_single_pass_and_experts():
  moe = config.MoEConfig(num_experts=4, expert_dim=8)
  change = dissected('mhc_single_pass', moe=moe)
  for name in set(NAMES) - {'as trained'}:
    assert (np.abs(change[name]) > 1e-5).all(), name


def test_the_plain_residual_is_refused():
  connection = config.ConnectionConfig(kind='residual')
  model = dataclasses.replace(TINY_RUN.model, connection=connection)
  with pytest.raises(ValueError, match="kind='residual' has one stream"):
    dissect.model_config(dataclasses.replace(TINY_RUN, model=model))
