"""The update over devices, and how it is traced."""

import dataclasses
import functools

from example_configs import TINY_RUN
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc import axes
from mhc import config
from mhc.model import parameters
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.training import step

pytestmark = [
  pytest.mark.long,
  pytest.mark.usefixtures('optax_promotion'),
]

TINY = config.Config(
  num_steps=10,
  mesh=config.MeshConfig(num_devices=8),
  model=dataclasses.replace(TINY_RUN.model, num_blocks=2, recompute='full'),
  # SGD-like: Adam would turn rounding of zero gradients into full steps.
  optimizer=config.OptimizerConfig(warmup_steps=2, eps=1.0),
  data=config.DataConfig(seq_len=12, batch_size=8),
)


def batch(programs, seed=0):
  tokens = np.random.default_rng(seed).integers(0, 256, (8, 13), np.int32)
  return partition.put(tokens, programs.mesh, partition.BATCH)


def trained(num_devices):
  mesh = config.MeshConfig(num_devices=num_devices)
  programs = step.build(dataclasses.replace(TINY, mesh=mesh))
  assert programs.mesh.size == num_devices
  state = generic_states.state(programs)
  metrics = []
  for seed in range(3):
    state, values = programs.train(
      state, batch(programs, seed), programs.inputs()
    )
    metrics.append(jax.device_get(values))
  nats = programs.token_losses(state, batch(programs))
  return jax.device_get(state), metrics, np.asarray(nats)


def test_eight_devices_compute_what_one_does():
  """Updates and all; gradients of the other kinds are in pipeline_grid.py."""
  one, eight = trained(1), trained(8)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert one[0].step == 3


@pytest.mark.slow
def test_experts_over_devices():
  """Loads are counted, and biases updated, over the whole batch.

  With an expert axis of four, each device has one expert and takes one row at a
  time; the capacity is so large that none of the groups drops anything.
  """
  experts = config.MoEConfig(
    num_experts=4,
    expert_dim=16,
    num_dense_blocks=1,
    balance_loss=0.1,
    dispatch='capacity',
    capacity_factor=3.0,
  )
  states, losses = [], []
  for num_devices, shards in ((1, 1), (4, 4)):
    programs = step.build(
      dataclasses.replace(
        TINY,
        mesh=config.MeshConfig(num_devices=num_devices, expert=shards),
        data=dataclasses.replace(TINY.data, microbatch_size=8 // shards // 2),
        model=dataclasses.replace(TINY.model.plain, moe=experts),
      )
    )
    state = generic_states.state(programs)
    gate = state.params['moe_blocks']['ffn']['gate']
    assert gate.addressable_shards[0].data.shape[1] == 4 // shards
    metrics = []
    for seed in range(3):
      state, values = programs.train(
        state, batch(programs, seed), programs.inputs()
      )
      metrics.append(values)
    states.append(jax.device_get(state))
    losses.append(jax.device_get(metrics))
  for pair in (states, losses):
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  bias = states[0].router_bias
  assert bias.shape == (1, 4)
  assert 0 < np.abs(bias).max() <= 3 * 0.001 + 1e-9
  assert losses[0][0]['moe/load_max_over_mean'] >= 1


def test_an_expert_axis_that_does_not_fit():
  experts = config.MoEConfig(num_experts=6, num_dense_blocks=1)
  model = dataclasses.replace(TINY.model, moe=experts)
  with pytest.raises(ValueError, match=r'num_experts=6.*mesh.expert=4'):
    dataclasses.replace(TINY, model=model, mesh=config.MeshConfig(expert=4))
  with pytest.raises(ValueError, match=r'num_experts=0.*mesh.expert=2'):
    dataclasses.replace(TINY, mesh=config.MeshConfig(expert=2))
  with pytest.raises(ValueError, match=r'num_devices=4.*mesh.expert=3'):
    config.MeshConfig(num_devices=4, expert=3)


def test_matrices_and_their_moments_are_split_over_data():
  settings = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
      TINY.model, moe=config.MoEConfig(num_experts=4, expert_dim=16)
    ),
  )
  state = step.build(settings).abstract_state
  whole = {
    parameters.path_names(path)[-1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if axes.DATA not in leaf.sharding.spec
  }
  # With Adam's count and the two counters of steps.
  assert whole == {'alpha', 'bias', 'gain', 'count', 'step', 'router_bias'}
  gate = state.opt_state[1][0].mu['moe_blocks']['ffn']['gate']
  assert gate.sharding.spec == partition.P('pipe', 'expert', 'data')


def test_loss_and_gradient_are_those_of_the_network_alone():
  """Of the mean over all tokens, without shard_map; and the sum of each row."""
  programs = step.build(TINY)
  state = generic_states.state(programs)
  tokens = batch(programs)
  whole = jax.tree.map(jnp.asarray, jax.device_get(state.params))
  given = jnp.asarray(jax.device_get(tokens))

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def alone(params):
    nats = optax.softmax_cross_entropy_with_integer_labels(
      programs.placement.merge(params)(given[:, :-1]), given[:, 1:]
    )
    return nats.mean(), nats.sum(axis=1)

  (mean, rows), grads = alone(whole)
  scored = programs.token_losses(state, tokens)
  np.testing.assert_allclose(scored, rows, rtol=1e-5)
  _, metrics = programs.train(state, tokens, programs.inputs())
  np.testing.assert_allclose(metrics['loss/train'], mean, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['grad/global_norm'], optax.tree.norm(grads), rtol=1e-4
  )


def test_programs_are_shared_between_seeds_only():
  other = dataclasses.replace(TINY, seed=5)
  assert step.build(other) is step.build(TINY)
  longer = dataclasses.replace(TINY, num_steps=11)
  assert step.build(longer) is not step.build(TINY)
  first, second = step.build(TINY).init(0), step.build(TINY).init(5)
  table = first.params['embed']['table']
  assert (table != second.params['embed']['table']).any()


def test_parameters_are_strong_float32():
  state = step.build(TINY).init(0)
  for leaf in jax.tree.leaves(state.params):
    assert leaf.dtype == jnp.float32
    assert not leaf.weak_type


def test_peak_bytes_grow_with_the_streams():
  plain = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
      TINY.model, connection=config.ConnectionConfig(kind='residual')
    ),
  )
  streams, stream = (
    memory.peak_bytes(step.build(settings).memory) for settings in (TINY, plain)
  )
  assert streams > stream > 0


def test_the_mesh_takes_the_devices_that_divide_the_batch():
  def mesh(num_devices, batch_size, microbatch_size=0):
    data = config.DataConfig(
      batch_size=batch_size, microbatch_size=microbatch_size
    )
    return mesh_lib.make_mesh(config.MeshConfig(num_devices), data)

  assert mesh(0, 8).size == 8
  assert mesh(0, 12).size == 6
  assert mesh(0, 7).size == 7
  with pytest.raises(ValueError, match=r'num_devices=9.*8 cpu'):
    mesh(9, 9)
  with pytest.raises(ValueError, match=r'batch_size=6.* 4 device'):
    mesh(4, 6)
  with pytest.raises(ValueError, match=r'microbatch_size=4.*12 rows.* are 6'):
    mesh(2, 12, 4)
