"""A block: attention and feed-forward, each in its connection.

Both have a norm in front; the feed-forward is dense or a mixture of experts.
"""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mhc import config as config_lib
from mhc import functional
from mhc.model import gqa
from mhc.model import layers
from mhc.model import mla
from mhc.model import moe
from mhc.model import parts
from mhc.model import recompute
from mhc.model import residual
from mhc.model import value_residual

Cache = mla.Cache | gqa.Cache
ATTENTION = {'mla': mla.MLA, 'gqa': gqa.GQA}


class BlockAux(NamedTuple):
  """The outputs of a block beside the streams."""

  contexts: tuple[functional.Context, functional.Context]
  # Their `residual.read_weights`.
  read_by: tuple[Float[Array, 'n t'] | None, Float[Array, 'n t'] | None]
  moe_stats: moe.Stats | None  # with experts
  cache: Cache | None  # in decoding


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
      return residual.make_connection(
        config.connection,
        dim,
        2 * index + sublayer,
        norm_eps=eps,
        depth=2 * config.num_blocks,
        is_first=sublayer == 0,
      )

    self.config = config.connection
    self.attention_connection = connection(0)
    self.attention_norm = layers.RMSNorm(dim, eps)
    attention = ATTENTION[config.attention.kind]
    added = dict(adapter_rank=config.adapter_rank, rngs=rngs)
    self.attention = attention(config.attention, dim, eps, **added)
    self.ffn_connection = connection(1)
    self.ffn_norm = layers.RMSNorm(dim, eps)
    if has_experts:
      self.ffn = moe.MoE(config.moe, dim, **added)
    else:
      self.ffn = layers.SwiGLU(dim, config.ffn_dim, **added)

  @parts.part(parts.DENSE)
  def __call__(
    self,
    state: value_residual.State,
    batch: tuple[int, int],
    router_bias: Float[Array, 'e'] | None,
    cache: Cache | None = None,
    start: Int[Array, ''] | None = None,
    is_real: Bool[Array, ''] | None = None,
  ) -> tuple[value_residual.State, BlockAux]:
    """One block on the streams [s, n, d] of s = b t tokens, batch = (b, t).

    With a cache, the tokens follow the `start` ones that it holds. A block that
    is not real, but fills a stage of a pipeline, leaves the streams as they
    are.
    """
    state, values_before = value_residual.split(state)
    h, first = residual.begin_sublayer(
      self.attention_connection, state, is_real
    )
    normed = self.attention_norm(h).reshape(*batch, -1)
    if cache is None:
      y, values = self.attention(normed, values_before)
    else:
      y, cache, values = self.attention.decode(
        normed, cache, start, values_before
      )
    y = recompute.name_output(y.reshape(h.shape))
    between = residual.between_sublayers(
      self.attention_connection, residual.PendingOutput(y, first)
    )
    h, second = residual.begin_sublayer(self.ffn_connection, between, is_real)
    read_by = (
      residual.read_weights(self.attention_connection, state, first),
      residual.read_weights(self.ffn_connection, between, second),
    )
    stats = None
    normed = self.ffn_norm(h).reshape(*batch, -1)
    if router_bias is None:
      y = self.ffn(normed)
    else:
      y, stats = self.ffn(normed, router_bias, is_real)
    y = recompute.name_output(y.reshape(h.shape))
    last = residual.PendingOutput(y, second)
    state = residual.end_block(
      self.config, self.ffn_connection, last, state, is_real
    )
    state = value_residual.joined(state, values, values_before, is_real)
    return state, BlockAux((first, second), read_by, stats, cache)
