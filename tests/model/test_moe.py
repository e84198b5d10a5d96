"""Routing, gates, load balancing and its statistics."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import moe

SETTINGS = config.MoEConfig(
  num_experts=6, experts_per_token=2, expert_dim=8, num_shared=1
)
DIM = 12


def layer(**changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  return moe.MoE(settings, DIM, rngs=nnx.Rngs(0))


def tokens(rows=3, time=16):
  return jax.random.normal(jax.random.key(1), (rows, time, DIM))


@jax.jit
def apply(layer, x, bias):
  return layer(x, bias)


def reference(layer, x, bias):
  """Token by token in numpy: choose by score + bias, weigh by score."""
  params = jax.tree.map(
    lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(layer))
  )

  def swiglu(x, gate, up, down):
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down

  out = np.zeros(x.shape)
  for place in np.ndindex(x.shape[:2]):
    v = np.asarray(x[place], np.float64)
    scores = 1 / (1 + np.exp(-v @ params['router']['weight']))
    chosen = np.argsort(-(scores + bias))[: layer.config.experts_per_token]
    for e in chosen:
      expert = swiglu(v, *(params[name][e] for name in ('gate', 'up', 'down')))
      out[place] += scores[e] / scores[chosen].sum() * expert
    shared = params['shared']
    out[place] += swiglu(
      v, *(shared[name]['weight'] for name in ('gate', 'up', 'down'))
    )
  return out


@pytest.mark.parametrize('k', [1, 2, 6])
def test_the_bias_selects_and_does_not_weigh(k):
  moe_layer = layer(experts_per_token=k)
  bias = jnp.array([0.3, 0, 0, -0.3, 0, 0.1])
  out, stats = apply(moe_layer, tokens(), bias)
  want = reference(moe_layer, tokens(), np.asarray(bias))
  np.testing.assert_allclose(out, want, rtol=0, atol=2e-5)
  assert stats.load.sum() == 3 * 16 * k
  if k < 6:
    plain, _ = apply(moe_layer, tokens(), jnp.zeros(6))
    assert jnp.abs(plain - out).max() > 1e-3


def test_experts_are_of_the_best_groups():
  """With gates that are not divided by their sum, but scaled."""
  settings = dict(num_groups=3, groups_per_token=1)
  moe_layer = layer(**settings, normalize_gates=False, gate_scale=2.5)
  bias = jnp.array([0.3, 0, 0, -0.3, 0, 0.1])
  tokens_ = np.asarray(tokens(), np.float64)
  weight = np.asarray(moe_layer.router.weight[...], np.float64)
  scores = 1 / (1 + np.exp(-tokens_ @ weight))
  ranking = (scores + np.asarray(bias)).reshape(3, 16, 3, 2)
  best = np.argmax(ranking.sum(-1), axis=-1)
  load = 2 * np.bincount(best.reshape(-1), minlength=3)
  out, stats = apply(moe_layer, tokens(), bias)
  shares = np.asarray(stats.load).reshape(3, 2)
  np.testing.assert_array_equal(shares.sum(1), load)
  free, _ = apply(layer(), tokens(), bias)
  assert jnp.abs(free - out).max() > 1e-2
  # Without its shared expert a layer is linear in the gates.
  one, two = (
    layer(**settings, num_shared=0, normalize_gates=False, gate_scale=scale)
    for scale in (1.0, 3.0)
  )
  one, two = (apply(each, tokens(), bias)[0] for each in (one, two))
  np.testing.assert_allclose(3 * one, two, rtol=1e-5, atol=1e-6)
  all_groups = layer(num_groups=2, groups_per_token=2)
  every, _ = apply(all_groups, tokens(), bias)
  np.testing.assert_array_equal(every, free)


def test_groups_that_cannot_be():
  for changes, message in (
    (dict(num_groups=4), 'num_groups=4 and moe.groups_per_token=1'),
    (dict(num_groups=2, groups_per_token=3), 'groups_per_token=3'),
    (
      dict(num_groups=3, experts_per_token=3),
      '1 groups of 2 experts are fewer',
    ),
    (dict(num_groups=3, router='sinkhorn'), "router='sinkhorn' evens"),
    (dict(gate_scale=0.0), 'moe.gate_scale=0.0 must be positive'),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize('router', ['bias', 'sinkhorn', 'none'])
def test_affinities_that_underflow_weigh_nothing(router):
  """All of a token's and all of an expert's, as in DeepSeek's code: 0."""
  moe_layer = layer(router=router)
  x = tokens().at[..., :2].set(jnp.array([0.0, 1.0]))
  x = x.at[1, 3, 0].set(1.0)
  weight = moe_layer.router.weight
  weight[...] = weight[...].at[0].set(-200.0).at[1, 5].set(-200.0)

  def loss(layer, x):
    out, stats = layer(x, jnp.zeros(6))
    return jnp.sum(jnp.sin(out)) + stats.balance_loss, out

  (_, out), grads = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  )(moe_layer, x)
  alone = moe_layer.shared(x)
  np.testing.assert_allclose(out[1, 3], alone[1, 3], rtol=1e-5, atol=1e-6)
  assert (jnp.abs(out - alone).max(axis=2) > 1e-3).sum() == 3 * 16 - 1
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all()


def test_shares_have_a_gradient_where_affinities_are_small():
  """Against float64, down to sums whose squares underflow."""
  generator = np.random.default_rng(0)
  logits = generator.normal(size=(8, 3)) - np.arange(8)[:, None] * 6
  g = generator.normal(size=(8, 3))
  s = 1 / (1 + np.exp(-logits))
  total = s.sum(1, keepdims=True) + 1e-20
  want = s / total
  d_s = (g - (g * want).sum(1, keepdims=True)) / total
  got, pull_back = jax.vjp(
    lambda x: moe.shares(jax.nn.sigmoid(x)), jnp.asarray(logits, jnp.float32)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  (got,) = pull_back(jnp.asarray(g, jnp.float32))
  np.testing.assert_allclose(got, d_s * s * (1 - s), atol=1e-5)


def test_every_parameter_learns_and_the_bias_does_not():
  def loss(layer, bias):
    return jnp.sum(jnp.sin(layer(tokens(), bias)[0]))

  grads, d_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(
    layer(experts_per_token=3), jnp.zeros(6)
  )
  for leaf in jax.tree.leaves(grads):
    assert np.abs(leaf).max() > 0
  assert not d_bias.any()


def test_the_update_evens_the_load():
  """A router that sends nearly all to one expert is pulled back."""
  moe_layer = layer()
  router = moe_layer.router.weight
  x = tokens(8, 64) + 1.0
  router[...] = router[...].at[:, 0].add(0.5)
  bias = jnp.zeros((1, 6))

  def imbalance(bias):
    _, stats = apply(moe_layer, x, bias[0])
    return stats.load, float(stats.load.max() / stats.load.mean())

  load, before = imbalance(bias)
  for _ in range(200):
    bias = moe.updated_bias(bias, load[None], 0.01)
    load, after = imbalance(bias)
  assert before > 2.5
  assert after < 1.3


def test_the_sinkhorn_router_evens_the_load_at_once():
  moe_layer = layer(router='sinkhorn', experts_per_token=1)
  router = moe_layer.router.weight
  router[...] = router[...].at[:, 0].add(0.5)
  x = tokens(8, 64) + 1.0
  _, stats = apply(moe_layer, x, jnp.zeros(6))
  plain = dataclasses.replace(moe_layer.config, router='bias')
  moe_layer.config = plain
  _, skewed = apply(moe_layer, x, jnp.zeros(6))
  assert skewed.load.max() / skewed.load.mean() > 3
  assert stats.load.max() / stats.load.mean() < 2
  shares = moe.sinkhorn_scores(
    jax.random.uniform(jax.random.key(0), (60, 6)) + 0.1
  )
  np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(shares.sum(0), 10, rtol=1e-3)


def test_balance_loss_is_one_when_even_and_larger_when_skewed():
  scores = jnp.full((12, 6), 0.5)
  even = jnp.arange(24).reshape(12, 2) % 6
  np.testing.assert_allclose(moe._balance_loss(scores, even, 2), 1, rtol=1e-5)
  skewed_scores = scores.at[:, :2].set(0.9)
  skewed = jnp.tile(jnp.arange(2), (12, 1))
  assert moe._balance_loss(skewed_scores, skewed, 2) > 1.3


@pytest.mark.parametrize('router', ['bias', 'sinkhorn', 'none'])
def test_the_balance_loss_counts_the_best_not_the_chosen(router):
  """DeepSeek-V3's Eq. 17-20 in float64, with a bias that changes the choice."""
  moe_layer = layer(router=router)
  x, bias = tokens(), jnp.array([0.5, 0, 0, -0.5, 0, 0.2])
  _, stats = apply(moe_layer, x, bias)
  logits = np.asarray(x, np.float64) @ np.asarray(moe_layer.router.weight[...])
  s = 1 / (1 + np.exp(-logits))
  want = 0.0
  for row in s:
    kth = np.sort(row, axis=1)[:, [-2]]
    frequency = 6 / 2 * (row >= kth).mean(axis=0)
    want += frequency @ (row / row.sum(axis=1, keepdims=True)).mean(axis=0) / 3
  np.testing.assert_allclose(stats.balance_loss, want, rtol=1e-5)


def test_load_metrics():
  load = jnp.array([[10.0, 10, 10, 10], [40.0, 0, 0, 0]])
  got = moe.load_metrics(load, jnp.array([0.0, 0.5]))
  np.testing.assert_allclose(got['moe/load_max_over_mean'], (1 + 4) / 2)
  np.testing.assert_allclose(got['moe/load_entropy'], 0.5, atol=1e-6)
  np.testing.assert_allclose(got['moe/dropped_share'], 0.25)
  alone = moe.load_metrics(jnp.array([[7.0]]), jnp.array([0.0]))
  assert alone['moe/load_entropy'] == 1


def test_bfloat16_activations_keep_a_float32_router():
  moe_layer = layer()
  x = tokens().astype(jnp.bfloat16)
  out, stats = apply(moe_layer, x, jnp.zeros(6))
  assert out.dtype == jnp.bfloat16
  assert stats.load.dtype == jnp.float32
  wide, _ = apply(moe_layer, x.astype(jnp.float32), jnp.zeros(6))
  np.testing.assert_allclose(
    out.astype(jnp.float32), wide, rtol=0.05, atol=0.05
  )
