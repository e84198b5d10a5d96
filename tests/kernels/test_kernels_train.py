"""Training with the kernels in place of plain JAX."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mhc import config
from mhc.kernels.pallas import launch
from mhc.parallel import partition
from mhc.training import state as state_lib
from mhc.training import step

pytestmark = pytest.mark.usefixtures('optax_promotion')

TINY = config.Config(
  num_steps=10,
  mesh=config.MeshConfig(num_devices=2),
  model=config.ModelConfig(
    num_blocks=1,
    dim=128,
    ffn_dim=32,
    recompute='none',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=8, rope_dim=4, kv_rank=8
    ),
  ),
  optimizer=config.OptimizerConfig(warmup_steps=1),
  data=config.DataConfig(seq_len=12, batch_size=4),
)


def built(implementation, moe):
  connection = config.ConnectionConfig(
    implementation=implementation, sinkhorn_iters=3
  )
  model = dataclasses.replace(TINY.model, connection=connection, moe=moe)
  return step.build(dataclasses.replace(TINY, model=model))


@functools.cache
def initial(moe):
  """The state before the first step, on the host: of both implementations."""
  return jax.device_get(built('xla', moe).init(0))


def losses(implementation, moe):
  programs = built(implementation, moe)
  state = jax.device_put(
    initial(moe), state_lib.shardings(programs.abstract_state)
  )
  found = []
  for seed in range(3):
    tokens = np.random.default_rng(seed).integers(0, 256, (4, 13), np.int32)
    tokens = partition.put(tokens, programs.mesh, partition.BATCH)
    state, metrics = programs.train(state, tokens, programs.inputs())
    found.append(float(metrics['loss/train']))
  return found


EXPERTS = config.MoEConfig(num_experts=4, expert_dim=16, num_dense_blocks=0)


@pytest.mark.parametrize(
  'moe', [config.MoEConfig(), pytest.param(EXPERTS, marks=pytest.mark.slow)]
)
def test_interpreted_kernels_train_as_plain_jax_does(moe, monkeypatch):
  """A dense block, or one of experts, on two devices."""
  monkeypatch.setattr(launch, 'TOKENS', (16,))
  plain, kernels = losses('xla', moe), losses('pallas', moe)
  assert len(set(plain)) == 3
  np.testing.assert_allclose(kernels, plain, rtol=0, atol=1e-4)
