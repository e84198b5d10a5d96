"""A pre-norm transformer whose residual is n streams wide.

embed -> expand to n streams -> blocks -> collapse -> norm -> logits. A block is
two sub-layers, attention and feed-forward, each with a norm in front and a
connection around it. Blocks are stacked along a leading dimension and run by
`jax.lax.scan`, so the program's size does not depend on the depth.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import attention
from mhc import config as config_lib
from mhc import connections
from mhc import layers
from mhc import streams


class Block(nnx.Module):
  """Attention and feed-forward, each inside its connection."""

  def __init__(self, config: config_lib.ModelConfig, index, *, rngs: nnx.Rngs):
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
    self.ffn = layers.SwiGLU(dim, config.ffn_dim, rngs=rngs)

  def __call__(
    self, x: connections.State
  ) -> tuple[connections.State, tuple[connections.Context, ...]]:
    h, first = self.attention_connection.pre(x)
    y = self.attention(self.attention_norm(h))
    h, second = connections.advance(
      self.attention_connection, self.ffn_connection, y, first
    )
    y = self.ffn(self.ffn_norm(h))
    return self.ffn_connection.post(y, second), (first, second)


class Transformer(nnx.Module):
  """tokens [b, t] -> logits [b, t, v]."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.embed = layers.Embed(config.vocab_size, config.dim, rngs=rngs)
    self.blocks = jax.vmap(
      lambda index, key: Block(config, index, rngs=nnx.Rngs(key))
    )(
      jnp.arange(config.num_blocks),
      jax.random.split(rngs.params(), config.num_blocks),
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

  def __call__(self, tokens: Int[Array, 'b t']) -> Float[Array, 'b t v']:
    """Next-token logits, float32."""
    x, _ = self._streams(tokens, collect=False)
    h = self.norm(connections.close_streams(x, self.collapse))
    return self.head(h).astype(jnp.float32)

  def mixing_matrices(
    self, tokens: Int[Array, 'b t']
  ) -> Float[Array, 'l s n n']:
    """H_res of every sub-layer l and token s = b t, in order of depth."""
    _, matrices = self._streams(tokens, collect=True)
    return matrices.reshape(-1, *matrices.shape[2:])

  def _streams(self, tokens, collect):
    config = self.config
    x = self.embed(tokens, jnp.dtype(config.dtype))
    x = connections.open_streams(config.connection, x)

    def run(x, block):
      x, contexts = block(x)
      if not collect:
        return x, None
      return x, jnp.stack([*map(connections.mixing_matrices, contexts)])

    if config.recompute == 'block':
      # prevent_cse is for code outside of a loop.
      run = jax.checkpoint(run, prevent_cse=False)
    return jax.lax.scan(run, x, self.blocks)
