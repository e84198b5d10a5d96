"""The network: what is equal at the start, what moves, what cannot be seen."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc import config
from mhc import streams
from mhc.model import layers
from mhc.model import residual
from mhc.model import transformer

SMALL = config.ModelConfig(
  num_blocks=3,
  dim=32,
  ffn_dim=48,
  recompute='none',
  attention=config.AttentionConfig(
    num_heads=2, head_dim=8, rope_dim=4, kv_rank=12
  ),
)


def settings(kind, **options):
  # Few iterations, for the sake of the compiler, which unrolls them.
  few = {'sinkhorn_iters': 3} if kind.startswith('mhc') else {}
  connection = config.ConnectionConfig(
    kind=kind, collapse=options.pop('collapse', 'mean'), **few
  )
  return dataclasses.replace(SMALL, connection=connection, **options)


@functools.cache
def network(kind, **options):
  return transformer.Transformer(settings(kind, **options), rngs=nnx.Rngs(0))


def tokens(rows=2, time=16, seed=0):
  return jax.random.randint(jax.random.key(seed), (rows, time), 0, 256)


def loss(model, x):
  nats = optax.softmax_cross_entropy_with_integer_labels(
    model(x[:, :-1]), x[:, 1:]
  )
  return jnp.mean(nats)


@jax.jit
def logits_of(model, x):
  return model(x)


@jax.jit
def final_streams(model, x):
  states, _ = model.embed_and_expand(x)
  states = model.enter_stage(states)
  states, _ = model.run_blocks(states, x.shape, None)
  return model.leave_stage(states)[0]


loss_and_grads = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(
  'kind',
  [k for k in config.KINDS[1:] if not k.startswith('attn_res')],
)
def test_every_kind_starts_as_the_plain_residual(kind):
  want = logits_of(network('residual'), tokens())
  assert jnp.std(want) > 0.1
  collapses = ('sum', 'mean', 'learned') if kind == 'mhc' else ('mean',)
  for collapse in collapses:
    got = logits_of(network(kind, collapse=collapse), tokens())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_sums(dtype):
  """Never rounded to bfloat16; against float64, with both gradients."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (10, SMALL.dim), dtype)
  weight = jax.random.normal(keys[1], (SMALL.dim, 20))
  g = jax.random.normal(keys[2], (10, 20))
  model = network('residual', dtype=jnp.dtype(dtype).name)
  head = np.asarray(model.head.weight[...].astype(dtype), np.float64)
  exact = np.asarray(x, np.float64)
  got = model.logits(x, (2, 5)).reshape(10, -1)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, exact @ head, rtol=0, atol=1e-5)
  _, pull_back = jax.vjp(layers.logits, x, weight)
  w, wide_g = (np.asarray(a.astype(dtype), np.float64) for a in (weight, g))
  tolerance = 1e-5 if dtype == jnp.float32 else 0.01
  for a, b in zip(pull_back(g), (wide_g @ w.T, exact.T @ wide_g), strict=True):
    b_max = np.abs(b).max()
    np.testing.assert_allclose(
      np.asarray(a, np.float64), b, rtol=0, atol=tolerance * b_max
    )


@pytest.mark.parametrize('kind', ['mhc_lite', 'kromhc'])
def test_the_start_of_a_kind_is_a_setting(kind):
  for init, read in (('mhc', [-3, 3, -3, -3]), ('authors', [-1, 1, -1, -1])):
    one = config.ConnectionConfig(kind=kind, init=init)
    connection = residual.make_connection(
      one, SMALL.dim, 1, 1e-20, depth=8, is_first=False
    )
    np.testing.assert_array_equal(connection.bias[...][:4], read)


def test_kinds_share_their_initial_weights():
  plain = nnx.to_pure_dict(nnx.state(network('residual')))
  mhc = nnx.to_pure_dict(nnx.state(network('mhc')))
  for name in ('attention', 'ffn'):
    jax.tree.map(
      np.testing.assert_array_equal,
      plain['dense_blocks'][name],
      mhc['dense_blocks'][name],
    )


def test_at_the_first_step_only_post_receives_a_gradient():
  """Equal streams and the norm behind `pre` stop every other path."""
  _, grads = loss_and_grads(network('mhc'), tokens())
  parts = np.cumsum((4, 4, 16))[:-1]  # pre, post, res
  for name in ('attention_connection', 'ffn_connection'):
    connection = getattr(grads.dense_blocks, name)
    bias = np.split(np.abs(connection.bias[...]), parts, axis=-1)
    phi = np.split(np.abs(connection.phi[...]), parts, axis=-1)
    assert bias[1].max() > 1e-3
    assert phi[1].max() > 1e-6
    for part in (bias[0], bias[2]):
      assert part.max() < 1e-6
    for part in (phi[0], phi[2]):
      assert part.max() < 1e-3 * phi[1].max()
    alpha = np.abs(connection.alpha[...])
    assert alpha.max() < 1e-6  # phi = 0


def test_streams_part_within_a_few_steps():
  """The one-hot b_pre breaks the symmetry; equal b_pre never would."""

  def spread_after(model, steps=20):
    for seed in range(steps):
      _, grads = loss_and_grads(model, tokens(seed=seed))
      model = jax.tree.map(lambda leaf, grad: leaf - 0.5 * grad, model, grads)
    x = final_streams(model, tokens())
    mean = jnp.mean(x, axis=1, keepdims=True)
    return float(jnp.linalg.norm(x - mean) / jnp.linalg.norm(x))

  symmetric = transformer.Transformer(settings('mhc'), rngs=nnx.Rngs(0))
  for name in ('attention_connection', 'ffn_connection'):
    bias = getattr(symmetric.dense_blocks, name).bias
    bias[...] = bias[...].at[:, :4].set(-3.0)
  assert spread_after(network('mhc')) > 1e-3
  assert spread_after(symmetric) < 1e-6


def test_causality_by_gradient():
  ids = jnp.arange(16)[None]  # token i stands at position i only
  grads = jax.jit(jax.grad(lambda model: jnp.sum(model(ids)[0, 9])))(
    network('mhc')
  )
  reached = np.abs(grads.embed.table[:16]).max(axis=1) > 0
  assert reached[:10].all()
  assert not reached[10:].any()


# Pipelines compute 'mhc' again: tests/pipeline/test_executor.py.
OFTEN = [('full', 2), ('mhc+block', 4)]
SELDOM = [('full', 4), ('mhc', 0), ('mhc+block', 6)]


@pytest.mark.parametrize(
  ('policy', 'every'),
  [*OFTEN, *(pytest.param(*each, marks=pytest.mark.slow) for each in SELDOM)],
)
def test_recompute_changes_no_gradient(policy, every):
  """3 blocks in groups of 1, 2 and a remainder, and 3."""
  _, want = loss_and_grads(network('mhc', recompute='none'), tokens())
  model = network('mhc', recompute=policy, recompute_every=every)
  _, grads = loss_and_grads(model, tokens())
  for a, b in zip(*map(jax.tree.leaves, (grads, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_stream_stats_come_in_order_of_depth():
  model = transformer.Transformer(settings('mhc'), rngs=nnx.Rngs(0))
  for number, name in enumerate(('attention_connection', 'ffn_connection')):
    bias = getattr(model.dense_blocks, name).bias
    strength = 1.0 + number + jnp.arange(0.0, 6.0, 2.0)  # sub-layers 0 ... 5
    bias[...] = (
      bias[...].at[:, 8:].set(strength[:, None] * jnp.eye(4).reshape(1, 16))
    )
  matrices = model.stream_stats(tokens()).res
  assert matrices.shape == (3, 2, 32, 4, 4)
  matrices = matrices.reshape(6, 32, 4, 4)
  want = jnp.exp(jnp.arange(1.0, 7.0))
  np.testing.assert_allclose(matrices[:, 0, 0, 0], want / (want + 3), rtol=1e-5)


def test_single_pass_reads_by_the_weights_of_the_sublayer_before():
  model = transformer.Transformer(settings('mhc_single_pass'), rngs=nnx.Rngs(0))
  for name in ('attention_connection', 'ffn_connection'):
    bias = getattr(model.dense_blocks, name).next_mhc.bias
    bias[...] = bias[...].at[:, :4].set(jnp.arange(4.0))
  pre = model.stream_stats(tokens()).pre.reshape(6, 32, 4)
  np.testing.assert_array_equal(pre[0, 0], [1, 0, 0, 0])
  assert (pre[1:] > 0.3).all()
  connection = jax.tree.map(lambda leaf: leaf[0], model.dense_blocks)
  x = streams.expand(model.embed(tokens(), jnp.dtype('float32')), 4)
  first = connection.attention_connection.next_mhc.mappings(
    x.reshape(32, 4, -1)
  )
  np.testing.assert_allclose(pre[1], first.pre.T, rtol=1e-5)


def test_bfloat16_activations():
  model = network('mhc', dtype='bfloat16')
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model))
  logits = logits_of(model, tokens())
  assert logits.dtype == jnp.float32
  value, grads = loss_and_grads(model, tokens())
  want, _ = loss_and_grads(network('mhc'), tokens())
  np.testing.assert_allclose(value, want, rtol=0.02)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_parameter_count():
  d, f, v = 32, 48, 320
  attention = d * 2 * 12 + d * 16 + 12 + 12 * 2 * 16 + 16 * d
  block = attention + 3 * d * f + 2 * d + 2 * (4 * d * 24 + 24 + 3)
  want = 3 * block + 2 * v * d + d
  assert sum(leaf.size for leaf in jax.tree.leaves(network('mhc'))) == want


def test_expansion_happens_once_per_model():
  """Streams differ between blocks once posts differ: no re-expansion."""
  model = transformer.Transformer(settings('mhc'), rngs=nnx.Rngs(0))
  bias = model.dense_blocks.ffn_connection.bias
  bias[...] = bias[...].at[0, 4:8].set(jnp.array([-2.0, -1.0, 1.0, 2.0]))
  x = final_streams(model, tokens())
  differences = jnp.abs(x - jnp.mean(x, axis=1, keepdims=True))
  assert differences.max() > 1e-2
  collapsed = streams.Collapse('mean', 32, 4)(x)
  assert collapsed.shape == (32, 32)
