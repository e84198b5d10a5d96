"""A pre-norm transformer whose residual is n streams wide.

embed -> expand to n streams -> blocks -> collapse -> norm -> logits. A block is
two sub-layers, attention and feed-forward (dense or a mixture of experts), each
with a norm in front and a connection around it. Blocks of one shape are stacked
along a leading dimension and run by `jax.lax.scan`, so the program's size does
not depend on the depth; with experts there are two stacks, the leading dense
blocks and the others.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import attention
from mhc import config as config_lib
from mhc import connections
from mhc import layers
from mhc import moe
from mhc import recompute
from mhc import streams


class Block(nnx.Module):
  """Attention and feed-forward, each inside its connection."""

  def __init__(
    self,
    config: config_lib.ModelConfig,
    index,
    *,
    has_experts: bool,
    rngs: nnx.Rngs,
  ):
    dim, eps = config.dim, config.norm_eps

    def connection(sublayer):
      return connections.make(
        config.connection, dim, 2 * index + sublayer, norm_eps=eps
      )

    self.attention_connection = connection(0)
    self.attention_norm = layers.RMSNorm(dim, eps)
    self.attention = attention.Attention(config.attention, dim, eps, rngs=rngs)
    self.ffn_connection = connection(1)
    self.ffn_norm = layers.RMSNorm(dim, eps)
    if has_experts:
      self.ffn = moe.MoE(config.moe, dim, rngs=rngs)
    else:
      self.ffn = layers.SwiGLU(dim, config.ffn_dim, rngs=rngs)

  def __call__(
    self,
    x: connections.State,
    batch: tuple[int, int],
    router_bias: Float[Array, 'e'] | None,
  ) -> tuple[
    connections.State, tuple[connections.Context, ...], moe.Stats | None
  ]:
    """One block on the streams [s, n, d] of s = b t tokens, batch = (b, t).

    Returns the streams, both connections' contexts and the experts' stats.
    """
    h, first = self.attention_connection.pre(x)
    normed = self.attention_norm(h)
    y = self.attention(normed.reshape(*batch, -1)).reshape(h.shape)
    y = recompute.output(y)
    h, second = connections.advance(
      self.attention_connection, self.ffn_connection, y, first
    )
    stats = None
    normed = self.ffn_norm(h).reshape(*batch, -1)
    if router_bias is None:
      y = self.ffn(normed)
    else:
      y, stats = self.ffn(normed, router_bias)
    y = recompute.output(y.reshape(h.shape))
    return self.ffn_connection.post(y, second), (first, second), stats


class Transformer(nnx.Module):
  """tokens [b, t] -> logits [b, t, v].

  With experts, every call takes the router's biases, [l, e] of the l blocks
  that have experts: they are state, not parameters, see `moe.updated_bias`.
  """

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    def stack(first, last, has_experts):
      def block(index, key):
        return Block(config, index, has_experts=has_experts, rngs=nnx.Rngs(key))

      keys = jax.random.split(rngs.params(), last - first)
      return jax.vmap(block)(jnp.arange(first, last), keys)

    num_dense = config.num_blocks - config.num_moe_blocks
    self.embed = layers.Embed(config.vocab_size, config.dim, rngs=rngs)
    self.dense_blocks = stack(0, num_dense, False) if num_dense else None
    self.moe_blocks = (
      stack(num_dense, config.num_blocks, True)
      if config.num_moe_blocks
      else None
    )
    self.collapse = streams.Collapse(
      config.connection.collapse,
      config.dim,
      config.connection.streams,
      norm_eps=config.norm_eps,
    )
    self.norm = layers.RMSNorm(config.dim, config.norm_eps)
    self.head = layers.Linear(config.dim, config.vocab_size, rngs=rngs)
    self.config = config

  def __call__(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
  ) -> Float[Array, 'b t v']:
    """Next-token logits, float32."""
    return self.logits_and_stats(tokens, router_bias)[0]

  def logits_and_stats(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
  ) -> tuple[Float[Array, 'b t v'], moe.Stats | None]:
    """The logits and each expert layer's `Stats`, stacked; None without."""
    x, _, stats = self._run(tokens, router_bias, collect=False)
    h = self.norm(connections.close_streams(x, self.collapse))
    h = h.reshape(*tokens.shape, -1)
    return self.head(h).astype(jnp.float32), stats

  def mixing_matrices(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
  ) -> Float[Array, 'm s n n']:
    """H_res of every sub-layer m and token s = b t, in order of depth."""
    _, matrices, _ = self._run(tokens, router_bias, collect=True)
    return jnp.concatenate(
      [stack.reshape(-1, *stack.shape[2:]) for stack in matrices]
    )

  def _run(self, tokens, router_bias, collect):
    """(streams, H_res of each stack if collected, stats of the experts)."""
    config = self.config
    if (router_bias is None) != (self.moe_blocks is None):
      raise ValueError('router_bias is for models with experts, and only those')
    x = self.embed(tokens, jnp.dtype(config.dtype))
    # Tokens in one dimension: connections reshape to that, and what keeps its
    # shape is kept once for the backward pass.
    batch = x.shape[:2]
    x = connections.open_streams(config.connection, x.reshape(-1, config.dim))

    def run(x, block_and_bias):
      block, bias = block_and_bias
      x, contexts, stats = block(x, batch, bias)
      matrices = None
      if collect:
        matrices = jnp.stack([*map(connections.mixing_matrices, contexts)])
      return x, (matrices, stats)

    every = config.recompute_every or recompute.best_every(
      2 * config.num_blocks, config.connection.streams
    )
    scan = functools.partial(
      recompute.scan, run, policy=config.recompute, blocks=every // 2
    )
    collected, stats = [], None
    if self.dense_blocks is not None:
      x, (matrices, _) = scan(x, (self.dense_blocks, None))
      collected.append(matrices)
    if self.moe_blocks is not None:
      x, (matrices, stats) = scan(x, (self.moe_blocks, router_bias))
      collected.append(matrices)
    return x, collected, stats
