"""Kernels against the reference in float64, and compiled for TPUs."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mhc import config
from mhc import plan
from mhc import sharding
from mhc import step
from mhc.kernels import dispatch
from mhc.kernels import reference
from mhc.kernels import sinkhorn


def exact(function, arguments, cotangent):
  """Output and gradients in float64."""
  with jax.enable_x64(True):
    wide = [
      jnp.asarray(np.asarray(x), jnp.float64) for x in (*arguments, cotangent)
    ]
    return [np.asarray(x) for x in both_ways(function)(*wide)]


def both_ways(function):
  """(arguments, cotangent) -> the output and every gradient, compiled."""

  def run(*arguments):
    out, pull_back = jax.vjp(function, *arguments[:-1])
    return out, *pull_back(arguments[-1])

  return jax.jit(run)


@pytest.mark.parametrize('eps', [0.0, 1e-6])
@pytest.mark.parametrize('n', [2, 3, 4, 8])
def test_sinkhorn_in_float64(n, eps):
  """Ragged tokens, logits up to a standard deviation of 5, any cotangent."""
  keys = jax.random.split(jax.random.key(n), 3)
  num_tokens = sinkhorn.TOKENS + 77
  spread = jnp.linspace(0.1, 5, num_tokens)[None, None]
  logits = spread * jax.random.normal(keys[0], (n, n, num_tokens))
  cotangent = jax.random.normal(keys[1], logits.shape)
  results = both_ways(lambda x: sinkhorn.sinkhorn(x, 20, eps, True))(
    logits, cotangent
  )
  want = exact(lambda x: reference.sinkhorn(x, 20, eps), [logits], cotangent)
  for got, exactly in zip(results, want, strict=True):
    np.testing.assert_allclose(got, exactly, rtol=0, atol=2e-6)


@pytest.mark.parametrize('num_iters', [1, 2])
def test_few_iterations_and_few_tokens(num_iters):
  logits = 3 * jax.random.normal(jax.random.key(0), (4, 4, 5))
  cotangent = jax.random.normal(jax.random.key(1), logits.shape)
  results = both_ways(lambda x: sinkhorn.sinkhorn(x, num_iters, 0.0, True))(
    logits, cotangent
  )
  want = exact(
    lambda x: reference.sinkhorn(x, num_iters, 0.0), [logits], cotangent
  )
  for got, exactly in zip(results, want, strict=True):
    np.testing.assert_allclose(got, exactly, rtol=0, atol=2e-6)


def test_extreme_logits_stay_finite():
  logits = 1e4 * jax.random.normal(jax.random.key(0), (4, 4, 200))
  out, pull_back = jax.vjp(
    lambda x: sinkhorn.sinkhorn(x, 20, 0.0, True), logits
  )
  np.testing.assert_allclose(jnp.sum(out, axis=1), 1, rtol=1e-5)
  assert jnp.isfinite(pull_back(out)[0]).all()


def test_the_choice_of_an_implementation():
  logits = jax.random.normal(jax.random.key(0), (3, 3, 10))
  plain = dispatch.sinkhorn(logits, 20, 0.0, 'xla')
  np.testing.assert_array_equal(dispatch.sinkhorn(logits, 20, 0.0), plain)
  with pytest.raises(ValueError, match='interpret'):
    dispatch.sinkhorn(logits, 20, 0.0, 'pallas')  # there is no TPU


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_sinkhorn_compiles_for_tpus(topology):
  """Forward and backward, inside a shard_map."""
  devices = np.array(plan.devices(topology))
  mesh = Mesh(devices.reshape(-1), ('data',), axis_types=(AxisType.Auto,))
  tokens = PartitionSpec(None, None, 'data')

  def both(logits, cotangent):
    out, pull_back = jax.vjp(lambda x: dispatch.sinkhorn(x, 20, 0.0), logits)
    return out, pull_back(cotangent)[0]

  array = jax.ShapeDtypeStruct(
    (4, 4, 4096), jnp.float32, sharding=NamedSharding(mesh, tokens)
  )
  lowered = jax.jit(
    jax.shard_map(both, mesh=mesh, in_specs=tokens, out_specs=tokens)
  ).lower(array, array)
  text = lowered.compile().as_text()
  assert text.count('tpu_custom_call') == 2


def test_a_training_step_for_a_tpu_calls_the_kernels(optax_promotion):
  """Under scan, remat and shard_map: each once a site."""
  settings = config.Config(
    num_steps=40,
    model=config.ModelConfig(
      num_blocks=2,
      dim=128,
      ffn_dim=128,
      dtype='bfloat16',
      recompute='mhc',
      attention=config.AttentionConfig(
        num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
      ),
    ),
    data=config.DataConfig(seq_len=128, batch_size=4),
  )
  mesh = sharding.make_mesh(0, settings.data, 1, plan.devices('v5e:2x2'))
  lowered = step.functions(
    settings.model, settings.optimizer, settings.num_steps, settings.data, mesh
  ).lower()
  text = lowered.as_text()
  # A block has two sites: forward, recomputed, backward.
  assert text.count('sinkhorn_forward') == 4
  assert text.count('sinkhorn_backward') == 2
  residual = dataclasses.replace(
    settings.model, connection=config.ConnectionConfig(kind='residual')
  )
  plain = step.functions(
    residual, settings.optimizer, settings.num_steps, settings.data, mesh
  ).lower()
  assert 'sinkhorn' not in plain.as_text()
