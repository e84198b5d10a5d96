"""Log-likelihoods and continuations of texts, whatever asks for them.

A request is scored as if it were alone: a row is padded at the right, where a
causal model does not look, rows of a batch do not see each other, and sums are
in float64. What differs with the batch is the order of sums inside a device.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mhc.data import tokenizer as tokenizer_lib
from mhc.evaluation import buckets
from mhc.evaluation import decoding
from mhc.evaluation import network as network_lib
from mhc.runtime import paths
from mhc.training import generate
from mhc.training import workdir as workdir_lib

Tokens = Sequence[int] | np.ndarray


@dataclasses.dataclass
class Truncated:
  """What did not fit into the model's length so far.

  Attributes:
    requests: contexts that lost tokens at their left.
    tokens: how many they lost.
    limited: continuations that were given less room than was asked for.
  """

  requests: int = 0
  tokens: int = 0
  limited: int = 0


class Scorer:
  """A network with a vocabulary, on one device.

  Attributes:
    tokenizer: its `start` stands before a text that has nothing before it.
    max_length: most tokens that the network is given at once.
    truncated: what did not fit, over all calls.
    requests, seconds: how many were answered, and how long that took.
  """

  def __init__(
    self,
    network: network_lib.Network,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    max_length: int,
    batch_size: int,
  ):
    """See the class.

    Raises:
      ValueError: max_length or batch_size is too small, or the vocabulary has
        more tokens than the network.
    """
    if max_length < 2:
      raise ValueError(
        f'max_length={max_length} must be at least 2: a token and one before it'
      )
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size} must be at least 1')
    if tokenizer.num_tokens > network.vocab_size:
      raise ValueError(
        f'the vocabulary has {tokenizer.num_tokens} tokens, the model '
        f'{network.vocab_size}: give the one that it was trained with'
      )
    self.tokenizer, self.max_length = tokenizer, max_length
    self.truncated = Truncated()
    self.requests, self.seconds = 0, 0.0
    self._network, self._batch_size = network, batch_size
    self._scores = jax.jit(self._score)
    self._decoder = decoding.Decoder(network, tokenizer, batch_size)

  def log_likelihoods(
    self, requests: Sequence[tuple[Tokens, Tokens]]
  ) -> list[tuple[float, bool]]:
    """Returns log p(continuation | context), and if it is the greedy one.

    The log-likelihood is in nats, the sum over the tokens of the continuation;
    it is greedy if each is the most probable one. A context is cut at its left
    where both are longer than the model's length, which `truncated` counts; a
    continuation that is longer by itself is read in windows, as in `rolling`.

    Args:
      requests: context and continuation; an empty context is the start token.

    Raises:
      ValueError: a continuation is empty, or a token is not in the vocabulary.
    """
    pairs = []
    for number, (context, continuation) in enumerate(requests):
      self._check(context, f'the context of request {number}')
      self._check(continuation, f'the continuation of request {number}')
      if len(continuation) == 0:
        raise ValueError(
          f'the continuation of request {number} is empty: there is nothing to '
          'score'
        )
      lost = len(context) + len(continuation) - self.max_length - 1
      if len(context) and (lost := min(lost, len(context) - 1)) > 0:
        self.truncated.requests += 1
        self.truncated.tokens += lost
      pairs.append((self._begun(context), continuation))
    with self._counted(pairs):
      return self._score_pairs(pairs)

  def rolling(self, texts: Sequence[Tokens]) -> list[float]:
    """The log-likelihoods of whole texts, each token scored once, in nats.

    A text is cut into windows of `max_length` tokens to predict. The first one
    follows the start token, a later one the last token before it; the last
    window begins earlier, so that it is as long as the others, and only its new
    tokens are scored.

    This is not `evaluate`, which scores rows of the held-out text as training
    packs it: there a row begins in the middle of a document, has others before
    it, and counts document marks. For a row that begins with the start token
    both are the same, but for the sign.

    Raises:
      ValueError: a token is not in the vocabulary.
    """
    for number, text in enumerate(texts):
      self._check(text, f'text {number}')
    pairs = [(self._begun(()), text) for text in texts]
    with self._counted(pairs):
      return [score for score, _ in self._score_pairs(pairs)]

  def generate(
    self,
    contexts: Sequence[Tokens],
    until: Sequence[str] = (),
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> list[str]:
    """Continues each context up to a stop string or the end of the document.

    At temperature 0 greedily; else the draws depend on the seed and on the
    request's number, not on the batch. A text ends before the first of `until`
    in it. Context and continuation share the model's length, of which a
    continuation gets what it asks for, but at most half; a context is cut at
    its left to the rest. `truncated` counts both.

    Raises:
      ValueError: a value is out of its range, a stop string is empty, or a
        token is not in the vocabulary.
    """
    if max_tokens < 1:
      raise ValueError(f'max_tokens={max_tokens} must be at least 1')
    generate.check_sampling(temperature, top_p)
    if '' in until:
      raise ValueError(
        "a stop string is '', which every text has: leave it out"
      )
    room = min(max_tokens, self.max_length // 2)
    rows = []
    for number, context in enumerate(contexts):
      self._check(context, f'the context of request {number}')
      # The last new token is never read.
      kept = self._begun(context)[-(self.max_length + 1 - room) :]
      if lost := max(0, len(context) - len(kept)):
        self.truncated.requests += 1
        self.truncated.tokens += lost
      self.truncated.limited += room < max_tokens
      rows.append(kept)
    sampling = decoding.Sampling(temperature, top_p, seed)
    with self._counted(rows):
      return self._decoder(rows, until, room, self.max_length, sampling)

  def record(self) -> dict[str, Any]:
    """What was done so far and what of it did not fit, for a JSON file."""
    return {
      'requests': self.requests,
      'seconds': self.seconds,
      'truncated': dataclasses.asdict(self.truncated),
    }

  @contextlib.contextmanager
  def _counted(self, requests):
    start = time.monotonic()
    yield
    self.requests += len(requests)
    self.seconds += time.monotonic() - start

  def _begun(self, context) -> list[int]:
    return [int(one) for one in context] or [int(self.tokenizer.start)]

  def _check(self, tokens, what):
    array = np.asarray(tokens)
    for wrong in array[(array < 0) | (array >= self._network.vocab_size)][:1]:
      raise ValueError(
        f'{what} has token {wrong}, outside of the vocabulary of '
        f'{self._network.vocab_size}'
      )

  def _score_pairs(self, pairs) -> list[tuple[float, bool]]:
    owners, rows, firsts = [], [], []
    for owner, pair in enumerate(pairs):
      for row, first in windows(*pair, self.max_length):
        owners.append(owner)
        rows.append(row)
        firsts.append(first)
    sums = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    lengths = [len(row) - 1 for row in rows]
    shapes = buckets.batches(lengths, self.max_length, self._batch_size)
    for size, chosen in shapes:
      batch = buckets.padded(
        [rows[number] for number in chosen], self._batch_size, size + 1
      )
      found = jax.device_get(self._scores(self._network.params, batch))
      for number, *of_row in zip(chosen, *found, strict=False):
        scored = slice(firsts[number] - 1, lengths[number])
        score, is_best = (one[scored] for one in of_row)
        sums[owners[number]] += float(score.sum(dtype=np.float64))
        greedy[owners[number]] &= bool(is_best.all())
    return list(zip(sums, greedy, strict=True))

  def _score(
    self, params, tokens: Int[Array, 'b t1']
  ) -> tuple[Float[Array, 'b t'], Bool[Array, 'b t']]:
    """Each target's log-probability, float32, and whether it is the largest."""
    targets = tokens[:, 1:]
    logits = self._network.logits(params, tokens[:, :-1])
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    return -nats, jnp.argmax(logits, axis=-1) == targets


def of_run(
  workdir: paths.Path, given: str | None = None, batch_size: int = 16
) -> Scorer:
  """The scorer of a run's newest checkpoint, as long as its rows of training.

  `given` is the vocabulary of a run whose own is unknown.

  Raises:
    ValueError: as `generate.restore`.
  """
  model, router_bias, tokenizer = generate.restore(workdir, given)
  return Scorer(
    network_lib.of_model(model, router_bias),
    tokenizer,
    max_length=workdir_lib.read_config(workdir).data.seq_len,
    batch_size=batch_size,
  )


def windows(
  context: Tokens, continuation: Tokens, max_length: int
) -> Iterator[tuple[list[int], int]]:
  """Rows of at most max_length + 1 tokens that score a continuation once.

  Yields:
    the row, and the place of the first token in it to score.
  """
  whole, start = [int(one) for one in (*context, *continuation)], len(context)
  while start < len(whole):
    end = min(len(whole), start + max_length)
    first = max(0, end - max_length - 1)
    yield whole[first:end], start - first
    start = end
