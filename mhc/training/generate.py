"""Generates text from a trained model, token by token with a latent cache.

The next token is drawn from softmax(logits / temperature), cut to its nucleus:
the fewest most probable tokens whose probabilities add up to `top_p`
(arXiv 1904.09751). Temperature 0 takes the most probable one.
"""

from collections.abc import Iterator
import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from mhc import config as config_lib
from mhc.data import tokenizer as tokenizer_lib
from mhc.model import transformer
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import vocabulary
from mhc.training import workdir as workdir_lib


def sample_token(
  logits: Float[Array, 'b v'], key: jax.Array, temperature: float, top_p: float
) -> Int[Array, 'b']:
  """Samples one token a row; see above."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1)
  logits = logits / temperature
  ranked = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(ranked, axis=-1)
  # The nucleus has the tokens before which the sum is less than top_p.
  inside = jnp.cumsum(probability, axis=-1) - probability < top_p
  least = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
  logits = jnp.where(logits >= least, logits, -jnp.inf)
  return jax.random.categorical(key, logits)


def check_sampling(temperature: float, top_p: float):
  """Raises ValueError for a value out of its range."""
  if not 0 <= temperature < math.inf:
    raise ValueError(f'temperature={temperature} must be 0 or more')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} must be above 0 and at most 1')


def generate(
  model: transformer.Transformer,
  router_bias: Float[Array, 'l e'] | None,
  prompt: Int[np.ndarray, 't'],
  *,
  num_samples: int,
  num_tokens: int,
  seed: int = 0,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Iterator[Int[np.ndarray, 'n']]:
  """Continues a prompt `num_samples` times.

  Args:
    model: as trained; see `inference_config` for models with experts.
    router_bias: that of a model with experts.
    prompt: at least one token.
    num_samples, num_tokens: number and length of the continuations.
    seed: seed of the sampler.
    temperature: 0 or more.
    top_p: more than 0, at most 1.

  Yields:
    the next token of every continuation, `num_tokens` times.

  Raises:
    ValueError: a value is out of its range.
  """
  check_sampling(temperature, top_p)
  if not 0 <= seed < 2**31:
    raise ValueError(f'seed={seed} must be from 0 to 2**31 - 1')
  if len(prompt) == 0:
    raise ValueError('the prompt must have at least one token')
  graphdef, params = nnx.split(model)

  @jax.jit
  def run(params, tokens, cache, start, key):
    decode = nnx.merge(graphdef, params).decode
    logits, cache = decode(tokens, cache, start, router_bias)
    return sample_token(logits[:, -1], key, temperature, top_p), cache

  cache = model.empty_cache(num_samples, len(prompt) + num_tokens)
  tokens = jnp.tile(jnp.asarray(prompt, jnp.int32)[None], (num_samples, 1))
  start, key = 0, jax.random.key(seed)
  for number in range(num_tokens):
    following, cache = run(
      params,
      tokens,
      cache,
      jnp.asarray(start, jnp.int32),
      jax.random.fold_in(key, number),
    )
    yield np.asarray(following)
    start += tokens.shape[1]
    tokens = following[:, None].astype(jnp.int32)


def inference_config(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The settings of a model for generation, token by token.

  A token's experts must not depend on other tokens: none is dropped, and a
  Sinkhorn router, which balances a batch, is replaced by the plain order of
  affinities (its bias has stayed 0).
  """
  moe = dataclasses.replace(config.moe, dispatch='dropless', router='bias')
  return dataclasses.replace(config, moe=moe)


def restore(
  workdir: paths.Path,
  given: str | None = None,
) -> tuple[
  transformer.Transformer, Float[Array, 'l e'] | None, tokenizer_lib.Tokenizer
]:
  """Restores the model of the newest checkpoint, its router bias and tokenizer.

  `given` is the vocabulary of a run whose own is unknown.

  Raises:
    ValueError: `workdir` holds no run or no checkpoint, or the vocabulary of
      its tokens is unknown.
  """
  config = workdir_lib.read_config(workdir)
  tokenizer = vocabulary.required(workdir, given)
  state = checkpoint.restore_model(workdir)
  graphdef, _ = transformer.abstract(inference_config(config.model))
  return (
    nnx.merge(graphdef, nnx.State(state.params)),
    state.router_bias,
    tokenizer,
  )
