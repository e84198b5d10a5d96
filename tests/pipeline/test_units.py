"""Units of a stage: the gradient of the whole, and what is kept of each."""

import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import axes
from mhc.pipeline import units as units_lib

CHUNKS, ROWS, DIM = 2, 4, 3


def run(blocks, bias, is_real, state):
  """`Stages.run` of rows x <- tanh(x W + b), with sum x^2 as the objective."""
  del is_real

  def row(state, one):
    state = jnp.tanh(state @ one[0] + one[1][None])
    return state, (jnp.sum(state**2), jnp.mean(state))

  state, (extra, stats) = jax.lax.scan(row, state, (blocks['w'], bias))
  return state, jnp.sum(extra), stats


def stages_of(recompute_blocks):
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  stack = ({'w': draw(0, CHUNKS, ROWS, DIM, DIM)}, draw(1, CHUNKS, ROWS, DIM))
  stages = types.SimpleNamespace(run=run, recompute_blocks=recompute_blocks)
  return stages, (*stack, None)


@pytest.mark.parametrize(('blocks', 'count'), [(1, 4), (2, 2), (6, 2)])
def test_gradients_are_those_of_the_stage_as_a_whole(blocks, count):
  """Of one chunk, added to what its sum has; the other chunk's stays."""
  (stages, stack), chunk = stages_of(blocks), 1
  units = units_lib.Units(stages, stack)
  assert len(units.numbers) == count
  state = jax.random.normal(jax.random.key(2), (5, DIM))
  d_state = jax.random.normal(jax.random.key(3), (5, DIM))
  weights, bias, _ = stack
  sums = jax.tree.map(lambda leaf: 10 + leaf, weights)

  def step(state, unit):
    state, stats, saved = units.ahead(chunk, unit, state)
    kept = {leaf.shape for leaf in saved}
    assert (ROWS // count, DIM, DIM) not in kept  # the weights
    return state, (stats, saved)

  def both(state, sums):
    state, (stats, saved) = jax.lax.scan(step, state, units.numbers)
    dx, sums = units.back(chunk, d_state, sums, saved)
    return state, units_lib.of_blocks(stats), dx, sums

  alone = jax.make_mesh((1, 1, 1), axes.AXES, devices=jax.devices()[:1])
  there = jax.shard_map(
    both, mesh=alone, in_specs=P(), out_specs=P(), check_vma=False
  )
  y, stats, dx, got = jax.jit(there)(state, sums)

  def whole(weights, state):
    blocks = jax.tree.map(lambda leaf: leaf[chunk], weights)
    state, extra, stats = run(blocks, bias[chunk], None, state)
    return (state, extra), stats

  (want_y, _), pull_back, want_stats = jax.vjp(
    whole, weights, state, has_aux=True
  )
  added, want_dx = pull_back((d_state, jnp.float32(1)))
  want = jax.tree.map(jnp.add, sums, added)
  for one, other in (
    (y, want_y),
    (stats, want_stats),
    (dx, want_dx),
    (got['w'], want['w']),
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got['w'][0], sums['w'][0])
