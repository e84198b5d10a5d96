"""Causal grouped-query attention (GQA, arXiv 2305.13245).

h query heads of k numbers share the keys and values of g heads, h / g queries
each; g = h is multi-head attention, g = 1 multi-query. A layer has

    d h k  queries,   2 d g k  keys and values,   h k d  output,

with `qkv_bias` (h + 2 g) k biases and with `qk_norm` 2 k gains of norms that
queries and keys pass, a head at a time, before RoPE turns them. Decoding keeps
2 g k numbers a token.
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

  key: Float[Array, '*l b s g k']  # rotated
  value: Float[Array, '*l b s g k']


class GQA(nnx.Module):
  """Grouped-query attention over [b, t, d]."""

  def __init__(
    self,
    config: config_lib.AttentionConfig,
    dim: int,
    norm_eps: float,
    *,
    adapter_rank: int = 0,
    rngs: nnx.Rngs,
  ):
    k = config.head_dim
    linear = functools.partial(
      layers.Linear, adapter_rank=adapter_rank, rngs=rngs
    )
    project = functools.partial(linear, bias=config.qkv_bias)
    wide, narrow = config.num_heads * k, config.num_kv_heads * k
    self.query = project(dim, wide)
    self.key = project(dim, narrow)
    self.value = project(dim, narrow)
    self.query_norm = layers.RMSNorm(k, norm_eps) if config.qk_norm else None
    self.key_norm = layers.RMSNorm(k, norm_eps) if config.qk_norm else None
    self.out = linear(wide, dim)
    self.value_residual = value_residual.make(config)
    self.config = config

  def __call__(
    self,
    x: Float[Array, 'b t d'],
    first: value_residual.FirstValues | None = None,
  ) -> tuple[Float[Array, 'b t d'], value_residual.FirstValues | None]:
    """As `MLA`."""
    query, key, value, first = self._project(x, 0, first)
    mixed = attention.causal_attention(
      query,
      key,
      value,
      rope.logit_scale(self.config),
      implementation=self.config.implementation,
    )
    mixed = recompute.name_inner(mixed.reshape(*x.shape[:2], -1))
    return self.out(mixed), first

  def decode(
    self,
    x: Float[Array, 'b t d'],
    cache: Cache,
    start: Int[Array, ''],
    first: value_residual.FirstValues | None = None,
  ) -> tuple[Float[Array, 'b t d'], Cache, value_residual.FirstValues | None]:
    """As `MLA.decode`."""
    query, key, value, first = self._project(x, start, first)
    cache = attention.extended(cache, Cache(key, value), start)
    mixed = attention.causal_attention(
      query, *cache, rope.logit_scale(self.config), start
    )
    return self.out(mixed.reshape(*x.shape[:2], -1)), cache, first

  @staticmethod
  def empty_cache(
    config: config_lib.AttentionConfig, shape: tuple[int, ...], dtype: str
  ) -> Cache:
    """A cache of zeros for tokens `shape`."""
    empty = jnp.zeros((*shape, config.num_kv_heads, config.head_dim), dtype)
    return Cache(empty, empty)

  def _project(self, x, start, first):
    """Rotated queries and keys, and values, by heads; `first` of the next."""
    query, key, value = (
      recompute.name_inner(project(x)).reshape(
        *x.shape[:2], -1, self.config.head_dim
      )
      for project in (self.query, self.key, self.value)
    )
    if self.query_norm is not None:
      query, key = self.query_norm(query), self.key_norm(key)
    query, key = (
      rope.rotate(each, self.config, start) for each in (query, key)
    )
    if first is not None:
      value, first = self.value_residual(value, first)
    return query, key, value, first
