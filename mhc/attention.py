"""Causal multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434).

Keys and values are expanded from one latent vector of `kv_rank` numbers a
token; position enters through `rope_dim` extra query numbers a head and one
extra key of that size, rotated by RoPE and shared by all heads. With h heads
of k numbers, rotary size r and latent rank c, a layer has

    d h (k + r)  queries,   d (c + r)  latent and rotary key,
    c            its norm,  c h 2k     keys and values,   h k d  output.

Queries are not compressed (no q-LoRA), as in the models of the mHC paper.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import config as config_lib
from mhc import layers
from mhc import recompute


class Attention(nnx.Module):
  """MLA over [b, t, d]."""

  def __init__(
    self,
    config: config_lib.AttentionConfig,
    dim: int,
    norm_eps: float,
    *,
    rngs: nnx.Rngs,
  ):
    heads, k, r = config.num_heads, config.head_dim, config.rope_dim
    self.query = layers.Linear(dim, heads * (k + r), rngs=rngs)
    self.down = layers.Linear(dim, config.kv_rank + r, rngs=rngs)
    self.norm = layers.RMSNorm(config.kv_rank, norm_eps)
    self.up = layers.Linear(config.kv_rank, heads * 2 * k, rngs=rngs)
    self.out = layers.Linear(heads * k, dim, rngs=rngs)
    self.config = config

  def __call__(self, x: Float[Array, 'b t d']) -> Float[Array, 'b t d']:
    c = self.config
    batch, time, _ = x.shape
    query = recompute.inner(self.query(x)).reshape(batch, time, c.num_heads, -1)
    query, query_rope = jnp.split(query, [c.head_dim], axis=-1)
    latent, key_rope = jnp.split(
      recompute.inner(self.down(x)), [c.kv_rank], axis=-1
    )
    up = recompute.inner(self.up(self.norm(latent))).reshape(
      batch, time, c.num_heads, -1
    )
    key, value = jnp.split(up, 2, axis=-1)
    query_rope = rotate(query_rope, c.rope_theta)
    key_rope = rotate(key_rope[:, :, None], c.rope_theta)[:, :, 0]

    # Logits and softmax in float32.
    logits = jnp.einsum(
      'bqhk,bshk->bhqs', query, key, preferred_element_type=jnp.float32
    )
    logits = logits + jnp.einsum(
      'bqhr,bsr->bhqs', query_rope, key_rope, preferred_element_type=jnp.float32
    )
    logits = logits * (c.head_dim + c.rope_dim) ** -0.5
    causal = jnp.tril(jnp.ones((time, time), bool))
    logits = jnp.where(causal[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
    weights = recompute.inner(weights)
    mixed = recompute.inner(jnp.einsum('bhqs,bshk->bqhk', weights, value))
    return self.out(mixed.reshape(batch, time, -1))


def rotate(x: Float[Array, 'b t h r'], theta: float) -> Float[Array, 'b t h r']:
  """RoPE (arXiv 2104.09864): pair (i, i + r/2) turned by t theta^(-2i/r)."""
  half = x.shape[-1] // 2
  rates = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * rates[None]
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
