"""A model as functions of its parameters: all that a scorer needs of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
from jaxtyping import Array, Float

from mhc.model import transformer


class Network(NamedTuple):
  """Two functions; what they do to a token depends on those before it alone.

  Attributes:
    vocab_size: tokens are from 0 to vocab_size - 1.
    params: a tree of arrays, the first argument of both.
    logits: params, tokens int32 [b, t] -> float32 [b, t, vocab_size], of the
      tokens that come next.
    decode: params, tokens int32 [b, t], cache, start int32 [] -> logits and
      cache, see `Transformer.decode`.
    empty_cache: b, size -> cache.
  """

  vocab_size: int
  params: Any
  logits: Callable[[Any, jax.Array], jax.Array]
  decode: Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
  empty_cache: Callable[[int, int], Any]


def of_model(
  model: transformer.Transformer, router_bias: Float[Array, 'l e'] | None
) -> Network:
  """The functions of a model from `generate.restore`.

  One with experts must have the settings of `generate.inference_config`: a
  token's experts would depend on the other rows of a batch.
  """
  graphdef, params = nnx.split(model)

  def logits(params, tokens):
    return nnx.merge(graphdef, params[0])(tokens, params[1])

  def decode(params, tokens, cache, start):
    merged = nnx.merge(graphdef, params[0])
    return merged.decode(tokens, cache, start, params[1])

  return Network(
    model.config.vocab_size,
    (params, router_bias),
    logits,
    decode,
    model.empty_cache,
  )
