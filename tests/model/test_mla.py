"""MLA against a loop over queries in numpy, and RoPE by its property."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import attention as attention_lib
from mhc.model import mla
from mhc.model import rope

SETTINGS = config.AttentionConfig(
  num_heads=2, head_dim=8, rope_dim=4, kv_rank=6
)


def test_matches_a_loop_over_queries():
  layer = mla.MLA(SETTINGS, 16, 1e-20, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 7, 16))
  got = np.asarray(layer(x)[0])[0]

  def weight(linear):
    return np.asarray(linear.weight[...], np.float64)

  wide = np.asarray(x[0], np.float64)
  query = (wide @ weight(layer.query)).reshape(7, 2, 12)
  down = wide @ weight(layer.down)
  latent, key_rope = down[:, :6], down[:, 6:]
  latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True))
  up = (latent @ weight(layer.up)).reshape(7, 2, 16)
  rates = 10_000.0 ** (-np.arange(2) / 2)

  def turned(v, t):
    z = (v[:2] + 1j * v[2:]) * np.exp(1j * t * rates)
    return np.concatenate([z.real, z.imag])

  want = np.zeros((7, 2, 8))
  for t in range(7):
    for head in range(2):
      q, q_rope = query[t, head, :8], turned(query[t, head, 8:], t)
      logits = [
        (q @ up[s, head, :8] + q_rope @ turned(key_rope[s], s)) / np.sqrt(12)
        for s in range(t + 1)
      ]
      weights = np.exp(logits) / np.exp(logits).sum()
      want[t, head] = weights @ up[: t + 1, head, 8:]
  want = want.reshape(7, 16) @ weight(layer.out)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_rope_depends_on_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  settings = dataclasses.replace(SETTINGS, rope_dim=8, rope_theta=100.0)
  turned = [
    rope.rotate(jnp.broadcast_to(v, (1, 10, 1, 8)), settings)[0, :, 0]
    for v in (q, k)
  ]
  scores = turned[0] @ turned[1].T
  np.testing.assert_allclose(scores[2, 0], scores[9, 7], rtol=1e-4)
  assert abs(scores[2, 0] - scores[3, 0]) > 1e-3


@pytest.mark.parametrize('shared', [False, True])
def test_blocks_of_queries_are_one_softmax(shared, monkeypatch):
  """Forward and gradients against all of [t, s] at once, 37 = 2 * 16 + 5."""
  keys = iter(jax.random.split(jax.random.key(0), 4))
  heads = () if shared else (3,)
  query = jax.random.normal(next(keys), (2, 37, 3, 6))
  key = jax.random.normal(next(keys), (2, 37, *heads, 6))
  value = jax.random.normal(next(keys), (2, 37, *heads, 4))
  cotangent = jax.random.normal(next(keys), (2, 37, 3, 4))

  def run():
    # A new function each time: `BLOCK` is read when it is traced.
    def both_ways(*arrays):
      out, pull_back = jax.vjp(
        lambda *args: attention_lib.causal_attention(*args, 0.5), *arrays
      )
      return out, *pull_back(cotangent)

    return jax.jit(both_ways)(query, key, value)

  whole = run()
  monkeypatch.setattr(attention_lib, 'BLOCK', 16)
  for got, want in zip(run(), whole, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_long_rows_never_make_all_logits():
  """At 4096 tokens no tensor of the gradient is [t, t]."""
  shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.bfloat16)

  def loss(*args):
    return jnp.sum(
      attention_lib.causal_attention(*args, 1.0).astype(jnp.float32)
    )

  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).as_text()
  assert '1024x4096xf32' in text
  assert '4096x4096' not in text


@pytest.mark.parametrize('query_rank', [0, 5])
def test_decoding_keeps_the_latent_and_gives_the_same(query_rank):
  settings = dataclasses.replace(SETTINGS, query_rank=query_rank)
  layer = mla.MLA(settings, 16, 1e-20, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  want, _ = layer(x)
  cache = mla.MLA.empty_cache(settings, (2, 9), 'float32')
  assert cache.latent.shape[-1] + cache.key_rope.shape[-1] == 6 + 4
  decode = nnx.jit(mla.MLA.decode)
  start, got = 0, []
  for size in (3, 1, 1, 2):
    y, cache, _ = decode(layer, x[:, start : start + size], cache, start)
    got.append(y)
    start += size
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=0, atol=1e-5)


def test_query_compression_has_its_parameters():
  def count(query_rank):
    settings = dataclasses.replace(SETTINGS, query_rank=query_rank)
    layer = mla.MLA(settings, 16, 1e-20, rngs=nnx.Rngs(0))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer)))

  heads = 2 * (8 + 4)
  assert count(5) - count(0) == 16 * 5 + 5 + 5 * heads - 16 * heads


def test_cudnn_gets_values_as_wide_as_keys(monkeypatch):
  """Its public function, of which a CPU has the plain implementation."""
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 40, 2, 12))
  value = jax.random.normal(jax.random.key(1), (1, 40, 2, 8))
  with pytest.raises(NotImplementedError, match='cuDNN'):
    attention_lib.by_cudnn(query, key, value, 0.5)
  public = jax.nn.dot_product_attention

  def plain(*arrays, implementation, **options):
    assert implementation == 'cudnn'
    return public(*arrays, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', plain)
  results = []
  for attend in (attention_lib.by_cudnn, attention_lib.in_blocks):
    out, pull_back = jax.vjp(
      lambda *args, attend=attend: attend(*args, 0.5), query, key, value
    )
    results.append((out, *pull_back(jnp.cos(out))))
  for got, want in zip(*results, strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_plain_attention_can_be_asked_for(monkeypatch):
  """Where a kernel that does not take the arrays would be said."""
  monkeypatch.setattr(attention_lib.platform_lib, 'platform', lambda: 'gpu')
  said = []
  monkeypatch.setattr(attention_lib, '_warn_once', said.append)
  x = jnp.ones((1, 4, 1, 8))
  attention_lib.causal_attention(x, x, x, 1.0, implementation='xla')
  assert not said
  attention_lib.causal_attention(x, x, x, 1.0)
  assert 'cuDNN' in said[0]
