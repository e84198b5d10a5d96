"""Continues many contexts at once, by a cache of their tokens.

Rows of different lengths share a batch without padding at the left, which would
move positions. All contexts are read at once, padded at the right; then the
batch goes on from the end of the shortest, token by token, and a row whose
context is longer is given its own tokens until that ends. A place of the cache
that holds padding is written again before a token can see it.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from mhc.data import tokenizer as tokenizer_lib
from mhc.evaluation import buckets
from mhc.evaluation import network as network_lib
from mhc.training import generate

# Tokens between two looks for stop strings.
STEPS = 8


class Sampling(NamedTuple):
  """How the next token is drawn, see `generate.sample_token`."""

  temperature: float
  top_p: float
  seed: int


class Decoder:
  """The programs of a network that continue `batch_size` rows."""

  def __init__(
    self,
    network: network_lib.Network,
    tokenizer: tokenizer_lib.Tokenizer,
    batch_size: int,
  ):
    self._network, self._tokenizer = network, tokenizer
    self._batch_size = batch_size
    self._read = jax.jit(self._read_contexts)
    self._steps = jax.jit(
      self._take_steps,
      static_argnames=('temperature', 'top_p'),
      donate_argnames=('rows', 'cache'),
    )

  def __call__(
    self,
    contexts: Sequence[list[int]],
    until: Sequence[str],
    max_tokens: int,
    max_length: int,
    sampling: Sampling,
  ) -> list[str]:
    """Texts of at most `max_tokens` tokens, in order of the contexts.

    Each context has at least one token and leaves room for the new ones: both
    are at most max_length + 1 tokens.
    """
    texts = [''] * len(contexts)
    lengths = [len(context) + max_tokens for context in contexts]
    shapes = buckets.batches(lengths, max_length + 1, self._batch_size)
    for size, chosen in shapes:
      rows = [contexts[number] for number in chosen]
      found = self._continue(rows, chosen, until, max_tokens, size, sampling)
      for number, text in zip(chosen, found, strict=True):
        texts[number] = text
    return texts

  def _continue(self, contexts, numbers, until, max_tokens, size, sampling):
    """The texts of one batch, whose cache holds `size` tokens."""
    missing = self._batch_size - len(contexts)
    lengths = [len(one) for one in contexts]
    longest = buckets.length(max(lengths), size)
    rows = buckets.padded(contexts, self._batch_size, size)
    seeds = np.array([*numbers, *[0] * missing], np.uint32)
    # Rows of padding are as long as the shortest.
    known = np.array([*lengths, *[min(lengths)] * missing], np.int32)
    cache = self._read(
      self._network.params,
      jnp.asarray(rows[:, :longest]),
      self._network.empty_cache(self._batch_size, size),
    )
    rows, place = jnp.asarray(rows), min(lengths) - 1
    last = max(lengths) + max_tokens - 1
    while True:
      rows, cache = self._steps(
        self._network.params,
        rows=rows,
        cache=cache,
        known=known,
        place=np.int32(place),
        numbers=seeds,
        seed=np.uint32(sampling.seed),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
      )
      place += STEPS
      # Places up to `place` hold tokens.
      host = np.asarray(rows)
      found = [
        self._ended(row[start : min(place + 1, start + max_tokens)], until)
        for start, row in zip(lengths, host, strict=False)
      ]
      if place >= last or all(is_ended for _, is_ended in found):
        return [text.decode(errors='replace') for text, _ in found]

  def _ended(self, tokens, until) -> tuple[bytes, bool]:
    """The text of new tokens up to its end, and whether it has ended."""
    stops = np.flatnonzero(tokens == self._tokenizer.stop)
    tokens = tokens[: stops[0]] if len(stops) else tokens
    text = self._tokenizer.decode(tokens)
    places = [text.find(one.encode()) for one in until]
    places = [place for place in places if place >= 0]
    text = text[: min(places)] if places else text
    return text, bool(len(stops) or places)

  def _read_contexts(self, params, tokens: Int[Array, 'b t'], cache):
    start = jnp.zeros((), jnp.int32)
    return self._network.decode(params, tokens, cache, start)[1]

  def _take_steps(
    self,
    params,
    rows: Int[Array, 'b s'],
    cache,
    known: Int[Array, 'b'],
    place: Int[Array, ''],
    numbers: Array,
    seed: Array,
    temperature: float,
    top_p: float,
  ):
    """Fills places place + 1, ..., place + STEPS of rows, if not `known`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
      jax.random.key(seed), numbers
    )
    draw = functools.partial(_draw, temperature=temperature, top_p=top_p)

    def step(carry, place):
      rows, cache = carry
      token = jax.lax.dynamic_slice_in_dim(rows, place, 1, axis=1)
      logits, cache = self._network.decode(params, token, cache, place)
      drawn = draw(logits[:, -1], keys, place).astype(rows.dtype)
      after = place + 1
      given = jax.lax.dynamic_slice_in_dim(rows, after, 1, axis=1)[:, 0]
      following = jnp.where(after < known, given, drawn)
      # What is beyond the cache is beyond all that was asked for.
      rows = rows.at[:, after].set(following, mode='drop')
      return (rows, cache), None

    places = place + jnp.arange(STEPS, dtype=jnp.int32)
    (rows, cache), _ = jax.lax.scan(step, (rows, cache), places)
    return rows, cache


def _draw(
  logits: Float[Array, 'b v'],
  keys: Array,
  place: Int[Array, ''],
  temperature: float,
  top_p: float,
) -> Int[Array, 'b']:
  """One token a row, each by its own key."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1)

  def one(logits, key):
    key = jax.random.fold_in(key, place)
    return generate.sample_token(logits[None], key, temperature, top_p)[0]

  return jax.vmap(one)(logits, keys)
