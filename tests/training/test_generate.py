"""Decoding token by token is the model, and draws are from the nucleus."""

import dataclasses

from flax import nnx
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import transformer
from mhc.training import generate as generate_lib

SMALL = config.ModelConfig(
  num_blocks=3,
  dim=32,
  ffn_dim=48,
  attention=config.AttentionConfig(
    num_heads=2, head_dim=8, rope_dim=4, kv_rank=12
  ),
)
EXPERTS = config.MoEConfig(num_experts=4, experts_per_token=2, expert_dim=16)


def network(kind, **changes):
  """With generic parameters."""
  settings = dataclasses.replace(
    SMALL,
    connection=config.ConnectionConfig(kind=kind, sinkhorn_iters=3),
    **changes,
  )
  graphdef, shapes = transformer.abstract(settings)
  moved = generic_states.parameters(shapes, seed=7)
  return nnx.merge(graphdef, nnx.State(jax.tree.map(jnp.asarray, moved)))


def check(model, bias):
  graphdef, params = nnx.split(model)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)

  @jax.jit
  def step(params, part, cache, start):
    return nnx.merge(graphdef, params).decode(part, cache, start, bias)

  @jax.jit
  def whole(params, tokens):
    return nnx.merge(graphdef, params)(tokens, bias)

  cache, start, got = model.empty_cache(2, 12), 0, []
  # A prompt of five at once, then one by one.
  for size in (5, 1, 1, 1, 1):
    part = tokens[:, start : start + size]
    logits, cache = step(params, part, cache, jnp.asarray(start, jnp.int32))
    got.append(logits)
    start += size
  want = whole(params, tokens)
  assert jnp.std(want) > 0.1
  np.testing.assert_allclose(
    jnp.concatenate(got, axis=1), want, rtol=0, atol=1e-4
  )


@pytest.mark.parametrize(
  'kind',
  [
    *('hc', 'mhc_single_pass'),
    # With experts, below, and of a prompt of three, there too.
    pytest.param('mhc', marks=pytest.mark.slow),
    pytest.param('residual', marks=pytest.mark.slow),
  ],
)
def test_decoding_agrees_with_the_whole_row(kind):
  check(network(kind), None)


def test_decoding_agrees_with_experts_and_compressed_queries():
  attention = dataclasses.replace(SMALL.attention, query_rank=10)
  model = network('mhc', moe=EXPERTS, attention=attention)
  check(model, jnp.linspace(-0.2, 0.2, 8).reshape(2, 4))


def test_the_nucleus():
  probabilities = jnp.array([0.5, 0.3, 0.15, 0.05])
  logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 4))

  def shares(temperature, top_p):
    drawn = generate_lib.sample_token(
      logits, jax.random.key(0), temperature, top_p
    )
    return np.bincount(drawn, minlength=4) / 4000

  np.testing.assert_allclose(shares(1.0, 1.0), probabilities, atol=0.03)
  np.testing.assert_allclose(shares(1.0, 0.75), [0.625, 0.375, 0, 0], atol=0.03)
  np.testing.assert_array_equal(shares(1.0, 1e-6), [1, 0, 0, 0])
  np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0])
  hot = probabilities**0.5 / jnp.sum(probabilities**0.5)
  np.testing.assert_allclose(shares(2.0, 1.0), hot, atol=0.03)


def test_generation_is_greedy_decoding_at_temperature_zero():
  model = network('mhc')
  prompt = np.array([256, 10, 20])
  drawn = generate_lib.generate(
    model, None, prompt, num_samples=2, num_tokens=4, temperature=0.0
  )
  drawn = np.stack(list(drawn), axis=1)
  assert drawn.shape == (2, 4)
  graphdef, params = nnx.split(model)
  whole = jax.jit(lambda params, row: nnx.merge(graphdef, params)(row))
  row = np.append(prompt, np.zeros(4, int))  # what is later is not seen
  for end in range(3, 7):
    logits = whole(params, jnp.asarray(row[None], jnp.int32))
    row[end] = jnp.argmax(logits[0, end - 1])
  np.testing.assert_array_equal(drawn, np.tile(row[3:], (2, 1)))


def test_a_seed_decides_the_draws():
  model = network('residual')

  def text(seed):
    drawn = generate_lib.generate(
      model, None, np.array([256]), num_samples=3, num_tokens=5, seed=seed
    )
    return np.stack(list(drawn))

  first = text(0)
  np.testing.assert_array_equal(text(0), first)
  assert (first != text(1)).any()
  assert (first[:, 0] != first[:, 1]).any()


def test_values_out_of_range():
  model = network('residual')
  for options, message in (
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'seed': 2**64}, 'seed=18446744073709551616 must'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_p': 1.5}, 'top_p=1.5'),
  ):
    drawn = generate_lib.generate(
      model, None, np.array([1]), num_samples=1, num_tokens=1, **options
    )
    with pytest.raises(ValueError, match=message):
      next(drawn)


def test_serving_drops_nothing_and_ranks_by_affinity():
  settings = dataclasses.replace(
    SMALL,
    moe=dataclasses.replace(EXPERTS, dispatch='capacity', router='sinkhorn'),
  )
  served = generate_lib.inference_config(settings).moe
  assert (served.dispatch, served.router) == ('dropless', 'bias')
