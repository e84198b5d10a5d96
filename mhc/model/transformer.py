"""A pre-norm transformer whose residual is n streams wide.

embed -> expand to n streams -> blocks -> collapse -> norm -> logits. Blocks of
one shape (`block.Block`) are stacked along a leading dimension and run by
`jax.lax.scan`, so the program's size does not depend on the depth; with experts
there are two stacks, the leading dense blocks and the others.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc import config as config_lib
from mhc import observation
from mhc import precision
from mhc.model import block as block_lib
from mhc.model import layers
from mhc.model import moe
from mhc.model import parts
from mhc.model import recompute
from mhc.model import residual
from mhc.model import value_residual

# From the name of a stack and the part of a block that the device keeps to the
# whole block.
GatherBlock = Callable[[str, nnx.Module], nnx.Module]
States = list[value_residual.State]  # of the sub-batches


class StackAux(NamedTuple):
  """The outputs of l blocks beside the streams, each leaf [l, ...]."""

  stream_stats: observation.StreamStats | None  # [l, 2, s, ...], if asked for
  moe_stats: moe.Stats | None
  cache: block_lib.Cache | None


class Transformer(nnx.Module):
  """tokens [b, t] -> logits [b, t, v].

  With experts, every call takes the router's biases, [l, e] of the l blocks
  that have experts: they are state, not parameters, see `moe.updated_bias`.
  """

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    def stack(first, last, has_experts):
      def block(index, key):
        return block_lib.Block(
          config, index, has_experts=has_experts, rngs=nnx.Rngs(key)
        )

      keys = jax.random.split(rngs.params(), last - first)
      return jax.vmap(block)(jnp.arange(first, last), keys)

    num_dense = config.num_blocks - config.num_moe_blocks
    sizes, tied = (config.vocab_size, config.dim), config.tied_embeddings
    self.embed = layers.Embed(*sizes, tied=tied, rngs=rngs)
    self.dense_blocks = stack(0, num_dense, False) if num_dense else None
    self.moe_blocks = (
      stack(num_dense, config.num_blocks, True)
      if config.num_moe_blocks
      else None
    )
    self.expand = residual.make_expand(config)
    self.collapse = residual.make_collapse(config)
    self.norm = layers.RMSNorm(config.dim, config.norm_eps)
    self.head = (
      None if tied else layers.Linear(config.dim, config.vocab_size, rngs=rngs)
    )
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
    num_sub_batches: int = 1,
    gather_block: GatherBlock | None = None,
  ) -> tuple[Float[Array, 'b t v'], moe.Stats | None]:
    """The logits and each expert layer's `Stats`, stacked; None without."""
    h, stats = self.hidden_and_stats(
      tokens,
      router_bias,
      num_sub_batches=num_sub_batches,
      gather_block=gather_block,
    )
    return self.logits(h, tokens.shape), stats

  def hidden_and_stats(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
    *,
    num_sub_batches: int = 1,
    gather_block: GatherBlock | None = None,
  ) -> tuple[Float[Array, 's d'], moe.Stats | None]:
    """What the head reads of the s = b t tokens, and the `Stats`.

    The rows go through each block in sub-batches, side by side, so that the
    tokens of one can travel to their experts while another is computed.
    """
    states, aux = self._embed(tokens, num_sub_batches), None
    for stack, bias in self._stacks(router_bias):
      states, aux = self._run_stack(
        stack, bias, states, tokens.shape, gather_block=gather_block
      )
    return self.collapse_and_norm(states), aux.moe_stats

  def decode(
    self,
    tokens: Int[Array, 'b t'],
    cache: block_lib.Cache,
    start: Int[Array, ''],
    router_bias: Float[Array, 'l e'] | None = None,
  ) -> tuple[Float[Array, 'b t v'], block_lib.Cache]:
    """Logits of t tokens that follow `start` others, and the cache with them.

    Connections act on each token alone: attention's cache is all the memory.
    With experts the result is that of a whole row if what happens to a token
    does not depend on others: `router='bias'`, `dispatch='dropless'`.
    """
    states, caches, first = self._embed(tokens), [], 0
    for stack, bias in self._stacks(router_bias):
      last = first + _length(getattr(self, stack))
      part = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], cache)
      states, aux = self._run_stack(
        stack, bias, states, tokens.shape, cache=part, start=start
      )
      caches.append(aux.cache)
      first = last
    h = self.collapse_and_norm(states)
    cache = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *caches)
    return self.logits(h, tokens.shape), cache

  def empty_cache(self, batch_size: int, size: int) -> block_lib.Cache:
    """A cache for rows of up to `size` tokens, all blocks stacked."""
    c, shape = self.config, (self.config.num_blocks, batch_size, size)
    attention = block_lib.ATTENTION[c.attention.kind]
    return attention.empty_cache(c.attention, shape, c.dtype)

  def stream_stats(
    self,
    tokens: Int[Array, 'b t'],
    router_bias: Float[Array, 'l e'] | None = None,
    *,
    gather_block: GatherBlock | None = None,
  ) -> observation.StreamStats:
    """[l, 2, s, ...] of both sub-layers of every block and token s = b t."""
    states, found = self._embed(tokens), []
    for stack, bias in self._stacks(router_bias):
      states, aux = self._run_stack(
        stack,
        bias,
        states,
        tokens.shape,
        collect=True,
        gather_block=gather_block,
      )
      found.append(aux.stream_stats)
    return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *found)

  def embed_and_expand(
    self,
    tokens: Int[Array, 'b t'],
    *,
    num_sub_batches: int = 1,
    collect: bool = False,
  ) -> tuple[States, StackAux | None]:
    """The input of the first stage of a pipeline.

    It embeds and, where `config.stack` has experts, runs the dense blocks, with
    `collect` for their `stream_stats`.
    """
    states, aux = self._embed(tokens, num_sub_batches), None
    if self.config.stack == 'moe_blocks' and self.dense_blocks is not None:
      states, aux = self._run_stack(
        'dense_blocks', None, states, tokens.shape, collect=collect
      )
    return self.leave_stage(states), aux

  def enter_stage(self, states: States) -> States:
    """What the blocks of a stage take, of what the stage before has left."""
    return self._on_streams(residual.with_empty_pending_output, states)

  def run_blocks(
    self,
    states: States,
    batch: tuple[int, int],
    router_bias: Float[Array, 'l e'] | None,
    is_real: Bool[Array, 'l'] | None = None,
    *,
    collect: bool = False,
  ) -> tuple[States, StackAux]:
    """The blocks of `config.stack`: all of a pipeline's stage, or some.

    Args:
      states: of tokens `batch`, from `enter_stage` or the blocks before.
      router_bias: with experts, of these l blocks.
      is_real: False for rows of padding (zeros); None for all True.
      collect: whether `aux.stream_stats` are asked for.
    """
    return self._run_stack(
      self.config.stack,
      router_bias,
      states,
      batch,
      is_real=is_real,
      collect=collect,
    )

  def leave_stage(self, states: States) -> States:
    """Plain streams, which travel to the next stage."""
    return self._on_streams(residual.flush_pending_output, states)

  def _on_streams(self, function, states):
    function = functools.partial(function, self.config.connection)
    return [value_residual.on_streams(function, state) for state in states]

  @parts.part(parts.HEAD)
  def collapse_and_norm(self, states: States) -> Float[Array, 's d']:
    """The streams as one, normed: what the head reads."""
    connection = self.config.connection
    h = jnp.concatenate(
      [
        residual.collapse_streams(
          connection, value_residual.split(state)[0], self.collapse
        )
        for state in states
      ]
    )
    return self.norm(h)

  @parts.part(parts.HEAD)
  def logits(
    self, h: Float[Array, 's d'], batch: tuple[int, int]
  ) -> Float[Array, 'b t v']:
    logits = precision.mark('logits', layers.logits(h, self.head_weight()))
    return logits.reshape(*batch, -1)

  def head_weight(self) -> Float[Array, 'd v']:
    """The matrix of the logits."""
    if self.head is None:
      return self.embed.table[...].T
    return self.head.weight[...]

  @parts.part(parts.HEAD)
  def _embed(self, tokens, num_sub_batches=1):
    x = self.embed(tokens, jnp.dtype(self.config.dtype))
    # Tokens in one dimension: connections reshape to that, and what keeps its
    # shape is kept once for the backward pass.
    batch = (tokens.shape[0] // num_sub_batches, tokens.shape[1])
    return [
      value_residual.opened(
        self.config.attention,
        residual.expand_streams(self.config.connection, part, self.expand),
        part,
        batch,
      )
      for part in jnp.split(x.reshape(-1, self.config.dim), num_sub_batches)
    ]

  def _stacks(self, router_bias):
    """The stacks in order of depth, with the biases of their routers."""
    if (router_bias is None) != (self.moe_blocks is None):
      raise ValueError('router_bias is for models with experts, and only those')
    both = ('dense_blocks', None), ('moe_blocks', router_bias)
    return [one for one in both if getattr(self, one[0]) is not None]

  def _run_stack(
    self,
    name,
    router_bias,
    states,
    batch,
    *,
    cache=None,
    start=None,
    is_real=None,
    collect=False,
    gather_block=None,
  ) -> tuple[States, StackAux]:
    blocks = getattr(self, name)
    part = (batch[0] // len(states), batch[1])

    def run_block(states, inputs):
      block, *rest, is_real = inputs
      if gather_block is not None:
        block = gather_block(name, block)
      both = [block(state, part, *rest, start, is_real) for state in states]
      states, auxes = map(list, zip(*both, strict=True))
      stats = moe.merge_stats([aux.moe_stats for aux in auxes])
      found = _stream_stats(auxes) if collect else None
      return states, StackAux(found, stats, auxes[0].cache)

    return recompute.scan(
      run_block,
      states,
      (blocks, router_bias, cache, is_real),
      policy=self.config.recompute,
      blocks=recompute.recompute_interval(self.config, _length(blocks)) // 2,
    )


def abstract(
  config: config_lib.ModelConfig,
) -> tuple[nnx.GraphDef, dict[str, Any]]:
  """The graph and the nested shapes of the parameters; nothing is allocated."""
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  )
  return graphdef, nnx.to_pure_dict(state)


def abstract_router_bias(
  config: config_lib.ModelConfig,
) -> jax.ShapeDtypeStruct | None:
  """The routers' biases of a model with experts, float32 [l, e]."""
  if not config.num_moe_blocks:
    return None
  shape = (config.num_moe_blocks, config.moe.num_experts)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _length(stack) -> int:
  return len(jax.tree.leaves(stack)[0])


def _stream_stats(auxes):
  """[2, s, ...]: the two sub-layers, and the tokens of all sub-batches."""
  both = [[*map(_sublayer_stats, aux.contexts, aux.read_by)] for aux in auxes]
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *two) for two in both]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *stacked)


def _sublayer_stats(context, read_by):
  """`StreamStats` of a sub-layer that has read by `residual.read_weights`."""
  mappings = context.mappings
  if mappings is not None:
    mappings = mappings._replace(pre=read_by)
  return observation.stream_stats(context.x, mappings)
