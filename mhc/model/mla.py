"""Causal multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434).

Keys and values are expanded from one latent vector of `kv_rank` numbers a
token; position enters through `rope_dim` extra query numbers a head and one
extra key of that size, rotated by RoPE and shared by all heads. With h heads
of k numbers, rotary size r and latent rank c, a layer has

    d h (k + r)  queries,   d (c + r)  latent and rotary key,
    c            its norm,  c h 2k     keys and values,   h k d  output.

With `query_rank` q > 0 the queries too come from a normed latent vector, of q
numbers: d q + q + q h (k + r) parameters. The models of the mHC paper have
none.

Decoding keeps only latent and rotary key of the tokens before, c + r numbers
each. The expansion is linear, so it is applied to queries and results instead:

    q . (W_key latent_s) = (W_key^T q) . latent_s,
    sum_s a_s W_value latent_s = W_value sum_s a_s latent_s.

With a value residual the values of all tokens are kept too: they are more than
the latent vectors say.
"""

import functools
from typing import NamedTuple

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import config as config_lib
from mhc.model import attention
from mhc.model import layers
from mhc.model import recompute
from mhc.model import rope
from mhc.model import value_residual


class Cache(NamedTuple):
  """What decoding keeps of s tokens."""

  latent: Float[Array, '*l b s c']  # normed
  key_rope: Float[Array, '*l b s r']  # rotated
  value: Float[Array, '*l b s h k'] | None  # with a value residual


class MLA(nnx.Module):
  """Latent attention over [b, t, d]."""

  def __init__(
    self,
    config: config_lib.AttentionConfig,
    dim: int,
    norm_eps: float,
    *,
    adapter_rank: int = 0,
    rngs: nnx.Rngs,
  ):
    heads, k, r = config.num_heads, config.head_dim, config.rope_dim
    rank, norm_eps = config.query_rank, config.latent_norm_eps or norm_eps
    linear = functools.partial(
      layers.Linear, adapter_rank=adapter_rank, rngs=rngs
    )
    self.query_down = linear(dim, rank) if rank else None
    self.query_norm = layers.RMSNorm(rank, norm_eps) if rank else None
    self.query = linear(rank or dim, heads * (k + r))
    self.down = linear(dim, config.kv_rank + r)
    self.norm = layers.RMSNorm(config.kv_rank, norm_eps)
    self.up = linear(config.kv_rank, heads * 2 * k)
    self.out = linear(heads * k, dim)
    self.value_residual = value_residual.make(config)
    self.config = config

  def __call__(
    self,
    x: Float[Array, 'b t d'],
    first: value_residual.FirstValues | None = None,
  ) -> tuple[Float[Array, 'b t d'], value_residual.FirstValues | None]:
    """The output, and the first block's values for the next, if asked for."""
    c = self.config
    batch, time, _ = x.shape
    query, query_rope, latent, key_rope = self._project(x, 0)
    up = recompute.name_inner(self.up(latent))
    up = up.reshape(batch, time, c.num_heads, -1)
    key, value = jnp.split(up, 2, axis=-1)
    if first is not None:
      value, first = self.value_residual(value, first)
    key_rope = jnp.broadcast_to(key_rope[:, :, None], query_rope.shape)
    mixed = attention.causal_attention(
      jnp.concatenate([query, query_rope], axis=-1),
      jnp.concatenate([key, key_rope], axis=-1),
      value,
      rope.logit_scale(c),
      implementation=c.implementation,
    )
    mixed = recompute.name_inner(mixed.reshape(batch, time, -1))
    return self.out(mixed), first

  def decode(
    self,
    x: Float[Array, 'b t d'],
    cache: Cache,
    start: Int[Array, ''],
    first: value_residual.FirstValues | None = None,
  ) -> tuple[Float[Array, 'b t d'], Cache, value_residual.FirstValues | None]:
    """As a call on all tokens so far, of which x has the last t.

    Args:
      x: tokens at positions start, ..., start + t - 1.
      cache: of the tokens before in its first `start` places.
      start: how many those are; start + t must not exceed the cache's size.
      first: the first block's values, of the tokens of x.

    Returns:
      the output for x, the cache with the t tokens added, and `first` for the
      next block.
    """
    c = self.config
    query, query_rope, latent, key_rope = self._project(x, start)
    up = self.up.matrix(x.dtype)
    up = up.reshape(c.kv_rank, c.num_heads, -1)
    to_key, to_value = jnp.split(up, 2, axis=-1)
    value = None
    if first is not None:
      value = jnp.einsum('btc,chk->bthk', latent, to_value)
      value, first = self.value_residual(value, first)
    cache = attention.extended(cache, Cache(latent, key_rope, value), start)
    query = jnp.einsum('bthk,chk->bthc', query, to_key)
    mixed = attention.causal_attention(
      jnp.concatenate([query, query_rope], axis=-1),
      jnp.concatenate([cache.latent, cache.key_rope], axis=-1),
      cache.latent if cache.value is None else cache.value,
      rope.logit_scale(c),
      start,
    )
    if cache.value is None:
      mixed = jnp.einsum('bthc,chk->bthk', mixed, to_value)
    return self.out(mixed.reshape(*x.shape[:2], -1)), cache, first

  @staticmethod
  def empty_cache(
    config: config_lib.AttentionConfig, shape: tuple[int, ...], dtype: str
  ) -> Cache:
    """A cache of zeros for tokens `shape`."""
    latent, rotary = (
      jnp.zeros((*shape, size), dtype)
      for size in (config.kv_rank, config.rope_dim)
    )
    value = None
    if config.value_residual:
      value = jnp.zeros((*shape, config.num_heads, config.head_dim), dtype)
    return Cache(latent, rotary, value)

  def _project(self, x, start):
    """Query and its rotary part, normed latent, rotary key."""
    c = self.config
    query = x
    if self.query_down is not None:
      query = self.query_norm(recompute.name_inner(self.query_down(x)))
    query = recompute.name_inner(self.query(query))
    query = query.reshape(*x.shape[:2], c.num_heads, -1)
    query, query_rope = jnp.split(query, [c.head_dim], axis=-1)
    latent, key_rope = jnp.split(
      recompute.name_inner(self.down(x)), [c.kv_rank], axis=-1
    )
    query_rope = rope.rotate(query_rope, c, start)
    key_rope = rope.rotate(key_rope[:, :, None], c, start)[:, :, 0]
    return query, query_rope, self.norm(latent), key_rope
