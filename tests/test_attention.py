"""MLA against a loop over queries in numpy, and RoPE by its property."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from mhc import attention
from mhc import config

SETTINGS = config.AttentionConfig(
  num_heads=2, head_dim=8, rope_dim=4, kv_rank=6
)


def test_matches_a_loop_over_queries():
  layer = attention.Attention(SETTINGS, 16, 1e-20, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (1, 7, 16))
  got = np.asarray(layer(x))[0]

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
  turned = [
    attention.rotate(jnp.broadcast_to(v, (1, 10, 1, 8)), 100.0)[0, :, 0]
    for v in (q, k)
  ]
  scores = turned[0] @ turned[1].T
  np.testing.assert_allclose(scores[2, 0], scores[9, 7], rtol=1e-4)
  assert abs(scores[2, 0] - scores[3, 0]) > 1e-3
