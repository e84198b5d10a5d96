"""Value residuals: attention by linearity, the network block by block."""

import dataclasses
import functools

from flax import nnx
import float64
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc import config as config_lib
from mhc.config import dicts
from mhc.model import block as block_lib
from mhc.model import residual
from mhc.model import transformer
from mhc.model import value_residual

LATENT = config_lib.AttentionConfig(
  num_heads=2, head_dim=8, rope_dim=4, kv_rank=6, value_residual=True
)
GROUPED = config_lib.AttentionConfig(
  kind='gqa',
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_dim=0,
  value_residual=True,
)
BOTH = pytest.mark.parametrize(
  'settings', [LATENT, GROUPED], ids=['mla', 'gqa']
)
ROWS = np.random.default_rng(0).integers(0, 256, (2, 7))


def model_config(settings, kind='residual', **changes):
  return dicts.replace(
    config_lib.ModelConfig(num_blocks=3, dim=16, ffn_dim=16),
    connection=dict(kind=kind, num_streams=2, sinkhorn_iters=3),
    attention=dicts.to_dict(settings),
    recompute='none',
    **changes,
  )


@functools.cache
def network(config):
  """With generic parameters."""
  graph, _ = transformer.abstract(config)
  params = generic_states.of_model(config, seed=1)
  return nnx.merge(graph, nnx.State(jax.tree.map(jnp.asarray, params)))


def one_of(model, index):
  """A block of a stack."""
  graph, state = nnx.split(model.dense_blocks)
  return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def nothing_yet(settings, batch):
  shape = *batch, settings.num_value_heads, settings.head_dim
  return value_residual.FirstValues(jnp.zeros(shape), jnp.zeros(()))


@BOTH
def test_the_formula_of_attention_is_linear(settings):
  """By other values under the same queries and keys: out + a other."""
  model = network(model_config(settings))
  layer, other = (one_of(model, index).attention for index in (0, 1))
  graph, state = nnx.split(layer)
  mixed, theirs = nnx.to_pure_dict(state), nnx.to_pure_dict(nnx.state(other))
  if settings.kind == 'gqa':
    mixed['value'] = theirs['value']
  else:  # keys and values of a head lie side by side
    pair = np.stack([mixed['up']['weight'], theirs['up']['weight']])
    pair = pair.reshape(2, 6, 2, 2, 8)
    both = np.stack([pair[0, :, :, 0], pair[1, :, :, 1]], axis=2)
    mixed['up'] = {'weight': jnp.asarray(both.reshape(6, -1))}
  other = nnx.merge(graph, nnx.State(mixed))
  x = jax.random.normal(jax.random.key(2), (2, 7, 16))
  run = jax.jit(lambda module, x, first: module(x, first))
  plain, own = run(layer, x, nothing_yet(settings, (2, 7)))
  theirs, first = run(other, x, nothing_yet(settings, (2, 7)))
  got, after = run(layer, x, first)
  gain = float(layer.value_residual.gain[0])
  assert abs(gain) > 0.05
  assert float(jnp.max(jnp.abs(first.values - own.values))) > 0.5
  within = float64.tolerance(1e-5)
  np.testing.assert_allclose(got, plain + gain * theirs, atol=within)
  np.testing.assert_array_equal(after.values, first.values)
  assert own.are_there == first.are_there == after.are_there == 1


def by_blocks(model):
  """The plain residual, its first values handed on by hand."""
  settings = model.config.attention
  x, first = model.embed(jnp.asarray(ROWS), jnp.float32), None
  for index in range(model.config.num_blocks):
    block = one_of(model, index)
    y, found = block.attention(
      block.attention_norm(x), first or nothing_yet(settings, ROWS.shape)
    )
    first = first or found
    x = x + y
    x = x + block.ffn(block.ffn_norm(x))
  return model.head(model.norm(x))


@BOTH
def test_the_first_values_reach_every_block(settings):
  model = network(model_config(settings))
  got = jax.jit(lambda model: model(jnp.asarray(ROWS)))(model)
  want = jax.jit(by_blocks)(model)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
  assert float(jnp.std(got)) > 0.1


@pytest.mark.parametrize('settings', [LATENT], ids=['mla'])
def test_it_starts_as_the_network_without(settings):
  config = model_config(settings, 'mhc')
  plain = dicts.replace(config, attention=dict(value_residual=False))
  ours = transformer.Transformer(config, rngs=nnx.Rngs(0))
  theirs = transformer.Transformer(plain, rngs=nnx.Rngs(0))
  run = jax.jit(lambda model: model(jnp.asarray(ROWS)))
  np.testing.assert_array_equal(run(ours), run(theirs))
  extra = jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs))
  count = [sum(leaf.size for leaf in leaves) for leaves in extra]
  assert count[0] - count[1] == config.num_blocks


@pytest.mark.parametrize(
  'settings',
  [LATENT, pytest.param(GROUPED, marks=pytest.mark.slow)],
  ids=['mla', 'gqa'],
)
def test_decoding_agrees_with_the_whole_row(settings):
  model = network(model_config(settings, 'mhc'))
  whole = jax.jit(lambda model: model(jnp.asarray(ROWS)))(model)
  decode = jax.jit(lambda model, *given: model.decode(*given))
  cache, at = model.empty_cache(2, 9), 0
  for size in (3, 1, 3):
    rows = jnp.asarray(ROWS[:, at : at + size])
    logits, cache = decode(model, rows, cache, jnp.int32(at))
    np.testing.assert_allclose(logits, whole[:, at : at + size], atol=1e-4)
    at += size


@pytest.mark.slow
def test_recompute_changes_no_gradient():
  def gradient(**changes):
    config = model_config(LATENT)
    model = network(config)
    graph = transformer.abstract(dataclasses.replace(config, **changes))[0]

    @jax.jit
    @jax.grad
    def run(params):
      logits = nnx.merge(graph, params)(jnp.asarray(ROWS[:, :-1]))
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, ROWS[:, 1:])
      )

    return run(nnx.state(model))

  want = gradient()
  for policy, every in (('full', 4), ('mhc', 2)):
    found = gradient(recompute=policy, recompute_every=every)
    for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
      np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
  gains = want['dense_blocks']['attention']['value_residual']['gain'][...]
  # The first block has nothing to add.
  assert not gains[0].any()
  assert np.abs(gains[1:]).min() > 1e-6


def test_a_block_that_is_not_real_hands_the_values_on():
  config = model_config(GROUPED)
  block = block_lib.Block(config, 0, has_experts=False, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (14, 16))
  streams = residual.expand_streams(config.connection, x)
  state = value_residual.opened(GROUPED, streams, x, (2, 7))
  for is_real in (False, True):
    after, _ = block(state, (2, 7), None, is_real=jnp.asarray(is_real))
    assert bool(after.first.are_there) == is_real
    assert bool(after.first.values.any()) == is_real
