"""Experts on four devices against the same experts on one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import axes
from mhc import config
from mhc.model import expert_parallel
from mhc.model import experts

DEVICES, TOKENS, NUM, K, DIM = 4, 32, 8, 3, 6


def inputs(load):
  keys = jax.random.split(jax.random.key(1), 6)
  weights = experts.Weights(
    jax.random.normal(keys[0], (NUM, DIM, 5)),
    jax.random.normal(keys[1], (NUM, DIM, 5)),
    jax.random.normal(keys[2], (NUM, 5, DIM)),
  )
  x = jax.random.normal(keys[3], (TOKENS, DIM))
  gates = jax.random.uniform(keys[4], (TOKENS, K))
  rng = np.random.default_rng(0)
  match load:
    case 'even':
      chosen = np.arange(TOKENS * K).reshape(TOKENS, K) % NUM
    case 'random':
      chosen = np.stack([rng.permutation(NUM)[:K] for _ in range(TOKENS)])
    case 'all to one device':  # its two experts, and a third
      chosen = np.tile([6, 7, 0], (TOKENS, 1))
  cotangent = jax.random.normal(keys[5], (TOKENS, DIM))
  return x, gates, weights, jnp.asarray(chosen, jnp.int32), cotangent


def over_devices(settings):
  mesh = jax.make_mesh(
    (DEVICES,),
    (axes.EXPERT,),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:DEVICES],
  )
  split = P(axes.EXPERT)

  def local(x, gates, weights, chosen):
    out, dropped, _ = expert_parallel.dispatch_and_combine(
      settings, x, chosen, gates, weights
    )
    dropped = axes.cast_varying(dropped, (axes.EXPERT,))
    return out, jax.lax.pmean(dropped, axes.EXPERT)

  return jax.shard_map(
    local, mesh=mesh, in_specs=(split,) * 4, out_specs=(split, P())
  )


@jax.jit
def one_device(x, gates, weights, chosen):
  return experts.dropless(x, chosen, gates, weights)


def settings(**options):
  return config.MoEConfig(
    num_experts=NUM, experts_per_token=K, expert_dim=5, **options
  )


@functools.cache
def pulled(transport):
  """Compiled: the outputs, the gradients and what is lost, over devices."""
  apply = over_devices(settings(transport=transport, buffer_factor=0.5))

  @jax.jit
  def run(*given):
    *floats, chosen, cotangent = given
    out, pull, dropped = jax.vjp(
      lambda *floats: apply(*floats, chosen), *floats, has_aux=True
    )
    return out, pull(cotangent), dropped

  return run


@jax.jit
def wanted(*given):
  """The outputs and the gradients on one device."""
  *floats, chosen, cotangent = given
  out, pull = jax.vjp(lambda *floats: one_device(*floats, chosen), *floats)
  return out, pull(cotangent)


@pytest.mark.parametrize(
  ('load', 'transport'),
  [
    *(('random', transport) for transport in ('all_to_all', 'all_gather')),
    ('all to one device', 'all_to_all'),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in (
        ('even', 'all_to_all'),
        ('even', 'all_gather'),
        ('all to one device', 'all_gather'),
      )
    ),
  ],
)
def test_nothing_is_lost(transport, load):
  """Outputs and gradients, with buffers so small that there are rounds."""
  given = inputs(load)
  *got, dropped = pulled(transport)(*given)
  want = wanted(*given)
  assert dropped == 0
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize('dispatch', ['dropless', 'capacity'])
@pytest.mark.parametrize('transport', ['all_to_all', 'all_gather'])
def test_no_expert_is_no_output(transport, dispatch):
  """As of a padded layer; tokens that have experts are not changed by it."""
  *floats, chosen, _ = inputs('random')
  options = settings(
    transport=transport, dispatch=dispatch, capacity_factor=100.0
  )
  apply = jax.jit(over_devices(options))
  none = jnp.full_like(chosen, NUM)
  np.testing.assert_array_equal(apply(*floats, none)[0], 0)
  some = jnp.where(jnp.arange(TOKENS)[:, None] % 2 == 0, chosen, NUM)
  out, dropped = apply(*floats, some)
  want = one_device(*floats, chosen)
  assert dropped == 0
  np.testing.assert_array_equal(out[1::2], 0)
  np.testing.assert_allclose(out[::2], want[::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('transport', ['all_to_all', 'all_gather'])
def test_a_capacity_drops_and_says_so(transport):
  def dropped(load, factor):
    *floats, chosen, _ = inputs(load)
    options = settings(
      transport=transport, dispatch='capacity', capacity_factor=factor
    )
    out, share = jax.jit(over_devices(options))(*floats, chosen)
    want = one_device(*floats, chosen)
    return np.abs(out - want).max(), float(share)

  assert dropped('even', 1.0) == (pytest.approx(0, abs=1e-4), 0)
  error, share = dropped('all to one device', 1.0)
  # 12 slots of each of three experts for 32 tokens.
  assert share == pytest.approx(20 / 32)
  assert error > 0.1


def test_an_expert_has_no_more_slots_than_there_are_tokens():
  chosen = jnp.zeros((NUM, K), jnp.int32)
  for factor, number in ((1.0, K), (1e30, NUM)):
    options = settings(dispatch='capacity', capacity_factor=factor)
    assert experts.expert_capacity(options, chosen) == number


def test_what_auto_is():
  assert expert_parallel.transport(settings(), 2) == 'all_gather'
  assert expert_parallel.transport(settings(), 4) == 'all_to_all'
  ragged = settings(transport='ragged_all_to_all')
  assert expert_parallel.transport(ragged, 2) == 'ragged_all_to_all'


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_the_ragged_operation_lowers(platform):
  """For accelerators, with its gradient; no CPU can run it."""
  *floats, chosen, _ = inputs('random')
  apply = over_devices(settings(transport='ragged_all_to_all'))

  def total(*floats):
    return jnp.sum(apply(*floats, chosen)[0])

  traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*floats)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('ragged_all_to_all') >= 4
