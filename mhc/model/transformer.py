"""A pre-norm transformer whose residual is n streams wide.

embed -> expand to n streams -> blocks -> collapse -> norm -> logits. A block is
two sub-layers, attention and feed-forward (dense or a mixture of experts), each
with a norm in front and a connection around it. Blocks of one shape are stacked
along a leading dimension and run by `jax.lax.scan`, so the program's size does
not depend on the depth; with experts there are two stacks, the leading dense
blocks and the others.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc import config as config_lib
from mhc import connections
from mhc import precision
from mhc import streams
from mhc.model import layers
from mhc.model import mla
from mhc.model import moe
from mhc.model import recompute

# Makes the block at hand of a stack, by its name, from the part of it that the
# device keeps.
Whole = Callable[[str, nnx.Module], nnx.Module]
States = list[connections.State]  # of the parts of a batch


def _as_it_is(name, block):
  del name
  return block


class Aux(NamedTuple):
  """What a block returns beside the streams."""

  contexts: tuple[connections.Context, connections.Context]
  stats: moe.Stats | None  # with experts
  cache: mla.Cache | None  # in decoding


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

    self.config = config.connection
    self.attention_connection = connection(0)
    self.attention_norm = layers.RMSNorm(dim, eps)
    self.attention = mla.Attention(config.attention, dim, eps, rngs=rngs)
    self.ffn_connection = connection(1)
    self.ffn_norm = layers.RMSNorm(dim, eps)
    if has_experts:
      self.ffn = moe.MoE(config.moe, dim, rngs=rngs)
    else:
      self.ffn = layers.SwiGLU(dim, config.ffn_dim, rngs=rngs)

  def __call__(
    self,
    state: connections.State,
    batch: tuple[int, int],
    router_bias: Float[Array, 'e'] | None,
    cache: mla.Cache | None = None,
    start: Int[Array, ''] | None = None,
    active: Bool[Array, ''] | None = None,
  ) -> tuple[connections.State, Aux]:
    """One block on the streams [s, n, d] of s = b t tokens, batch = (b, t).

    With a cache, the tokens follow the `start` ones that it holds. A block that
    is not active is computed, and leaves the streams as they are.
    """
    h, first = connections.enter(self.attention_connection, state)
    first = connections.masked(first, active, state)
    normed = self.attention_norm(h).reshape(*batch, -1)
    if cache is None:
      y = self.attention(normed)
    else:
      y, cache = self.attention.decode(normed, cache, start)
    y = recompute.output(
      connections.silenced(y.reshape(h.shape), first, active)
    )
    h, second = self.ffn_connection.advance(y, first)
    second = connections.masked(second, active, first)
    stats = None
    normed = self.ffn_norm(h).reshape(*batch, -1)
    if router_bias is None:
      y = self.ffn(normed)
    else:
      y, stats = self.ffn(normed, router_bias, active)
    y = recompute.output(
      connections.silenced(y.reshape(h.shape), second, active)
    )
    state = connections.leave(self.config, self.ffn_connection, y, second)
    return state, Aux((first, second), stats, cache)


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
    *,
    parts: int = 1,
    whole: Whole = _as_it_is,
  ) -> tuple[Float[Array, 'b t v'], moe.Stats | None]:
    """The logits and each expert layer's `Stats`, stacked; None without.

    The rows go through each block in `parts`, side by side, so that the tokens
    of one can travel to their experts while another is computed.
    """
    states, auxes = self._run(tokens, router_bias, parts=parts, whole=whole)
    stats = auxes[-1].stats
    return self.logits(self.close(states), tokens.shape), stats

  def decode(
    self,
    tokens: Int[Array, 'b t'],
    cache: mla.Cache,
    start: Int[Array, ''],
    router_bias: Float[Array, 'l e'] | None = None,
  ) -> tuple[Float[Array, 'b t v'], mla.Cache]:
    """Logits of t tokens that follow `start` others, and the cache with them.

    Connections act on each token alone: attention's cache is all the memory.
    With experts the result is that of a whole row if what happens to a token
    does not depend on others: `router='bias'`, `dispatch='dropless'`.
    """
    states, auxes = self._run(tokens, router_bias, cache=cache, start=start)
    cache = jax.tree.map(
      lambda *stacks: jnp.concatenate(stacks), *(aux.cache for aux in auxes)
    )
    return self.logits(self.close(states), tokens.shape), cache

  def empty_cache(self, batch_size: int, size: int) -> mla.Cache:
    """For rows of up to `size` tokens, all blocks stacked."""
    c, shape = self.config, (self.config.num_blocks, batch_size, size)
    return mla.Cache(
      jnp.zeros((*shape, c.attention.kv_rank), c.dtype),
      jnp.zeros((*shape, c.attention.rope_dim), c.dtype),
    )

  def sites(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
    *,
    whole: Whole = _as_it_is,
  ) -> connections.Site:
    """[m, s, ...] of every sub-layer m, by depth, and token s = b t."""
    _, auxes = self._run(tokens, router_bias, collect=True, whole=whole)
    return jax.tree.map(
      lambda *stacks: jnp.concatenate(
        [stack.reshape(-1, *stack.shape[2:]) for stack in stacks]
      ),
      *(aux.contexts for aux in auxes),
    )

  def open(
    self,
    tokens: Int[Array, 'b t'],
    *,
    parts: int = 1,
    collect: bool = False,
  ) -> tuple[States, Aux | None]:
    """What stands before `config.stack`: embedding and other blocks, if any."""
    states, aux = self._embed(tokens, parts), None
    if self.config.stack == 'moe_blocks' and self.dense_blocks is not None:
      states, aux = self._through(
        'dense_blocks', None, states, tokens.shape, collect=collect
      )
    return [connections.land(self.config.connection, s) for s in states], aux

  def stage(
    self,
    states: States,
    batch: tuple[int, int],
    router_bias: Float[Array, 'l e'] | None,
    active: Bool[Array, 'l'] | None = None,
    *,
    collect: bool = False,
  ) -> tuple[States, Aux]:
    """The blocks of `config.stack`, one stage of a pipeline.

    Args:
      states: what `open` or the stage before has returned, of tokens `batch`.
      router_bias: with experts, of these l blocks.
      active: False for rows of padding (zeros); None for all True.
      collect: as for `sites`, which are `aux.contexts` then.
    """
    connection = self.config.connection
    states, aux = self._through(
      self.config.stack,
      router_bias,
      [connections.take_off(connection, s) for s in states],
      batch,
      active=active,
      collect=collect,
    )
    return [connections.land(connection, s) for s in states], aux

  def close(self, states: States) -> Float[Array, 's d']:
    """The streams as one, normed: what the head reads."""
    connection = self.config.connection
    h = jnp.concatenate(
      [connections.close_streams(connection, s, self.collapse) for s in states]
    )
    return self.norm(h)

  def logits(
    self, h: Float[Array, 's d'], batch: tuple[int, int]
  ) -> Float[Array, 'b t v']:
    logits = self.head(h.reshape(*batch, -1)).astype(jnp.float32)
    return precision.mark('logits', logits)

  def _embed(self, tokens, parts=1):
    x = self.embed(tokens, jnp.dtype(self.config.dtype))
    # Tokens in one dimension: connections reshape to that, and what keeps its
    # shape is kept once for the backward pass.
    return [
      connections.open_streams(self.config.connection, part)
      for part in jnp.split(x.reshape(-1, self.config.dim), parts)
    ]

  def _run(
    self,
    tokens,
    router_bias,
    *,
    collect=False,
    cache=None,
    start=None,
    parts=1,
    whole=_as_it_is,
  ):
    """The last states, and the `Aux` of each stack of blocks."""
    config = self.config
    if (router_bias is None) != (self.moe_blocks is None):
      raise ValueError('router_bias is for models with experts, and only those')
    states = self._embed(tokens, parts)
    auxes, num_dense = [], config.num_blocks - config.num_moe_blocks
    for name, bias, part in (
      ('dense_blocks', None, slice(num_dense)),
      ('moe_blocks', router_bias, slice(num_dense, None)),
    ):
      if getattr(self, name) is None:
        continue
      states, aux = self._through(
        name,
        bias,
        states,
        tokens.shape,
        cache=jax.tree.map(lambda leaf, part=part: leaf[part], cache),
        start=start,
        collect=collect,
        whole=whole,
      )
      auxes.append(aux)
    return states, auxes

  def _through(
    self,
    name,
    bias,
    states,
    batch,
    *,
    cache=None,
    start=None,
    active=None,
    collect=False,
    whole=_as_it_is,
  ):
    """A stack of blocks; the contexts are `Site`s if they are collected."""
    config, blocks = self.config, getattr(self, name)

    part = (batch[0] // len(states), batch[1])

    def run(states, inputs):
      block, bias, cache, active = inputs
      block = whole(name, block)
      states, auxes = zip(
        *(block(state, part, bias, cache, start, active) for state in states),
        strict=True,
      )
      sites = None
      if collect:
        # [2, s, ...]: the two sub-layers, and the tokens of all parts.
        both = [[*map(connections.site, aux.contexts)] for aux in auxes]
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *two) for two in both]
        sites = jax.tree.map(
          lambda *parts: jnp.concatenate(parts, axis=1), *stacked
        )
      stats = moe.joined([aux.stats for aux in auxes])
      return [*states], Aux(sites, stats, auxes[0].cache)

    length = len(jax.tree.leaves(blocks)[0])
    return recompute.scan(
      run,
      states,
      (blocks, bias, cache, active),
      policy=config.recompute,
      blocks=recompute.interval(config, length) // 2,
    )
