"""The text of a run: one corpus, or several mixed by weights.

Each of a mixture keeps its own split; they share one vocabulary, that of the
token folders among them, by which text is then read.
"""

from collections.abc import Collection
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple

from mhc import config as config_lib
from mhc.data import corpus as corpus_lib
from mhc.data import tokenizer as tokenizer_lib

# A model of more tokens is not meant for the text that is there by default.
MOST_FOR_BYTES = 4096
MANY_EPOCHS = 4.0  # from which on repeated text teaches less and less


class Mixture(NamedTuple):
  """Corpora and the shares of them in training, which add up to 1."""

  corpora: tuple[corpus_lib.Corpus, ...]
  weights: tuple[float, ...]
  names: tuple[str, ...]  # short ones

  @classmethod
  def of(cls, corpus: corpus_lib.Corpus) -> 'Mixture':
    return cls((corpus,), (1.0,), (corpus.name,))

  @property
  def tokenizer(self) -> tokenizer_lib.Tokenizer | None:
    return self.corpora[0].tokenizer

  @property
  def sha256(self) -> str:
    """A digest of all text, and of the weights if there are several."""
    if len(self.corpora) == 1:
      return self.corpora[0].sha256
    parts = [
      f'{corpus.sha256} {weight}'
      for corpus, weight in zip(self.corpora, self.weights, strict=True)
    ]
    return hashlib.sha256(' '.join(parts).encode()).hexdigest()

  @property
  def num_train_tokens(self) -> int:
    return sum(corpus.num_train_tokens for corpus in self.corpora)

  @property
  def num_heldout_tokens(self) -> int:
    return sum(corpus.num_heldout_tokens for corpus in self.corpora)

  def lines(self) -> list[str]:
    """What was found, for the start of a run."""
    if len(self.corpora) == 1:
      return [self.corpora[0].line()]
    return [
      f'{weight:.1%} of {corpus.line()}'
      for corpus, weight in zip(self.corpora, self.weights, strict=True)
    ]

  def skipped(self) -> list[str]:
    """Names of the damaged blocks that this process has met."""
    return sorted({name for c in self.corpora for name in c.log.blocks})

  def summary(
    self, num_tokens: int, blocks: Collection[str] = ()
  ) -> dict[str, Any]:
    """For a run of `num_tokens` whose processes met the damaged `blocks`."""
    found = [corpus.summary() for corpus in self.corpora]
    total = {
      name: sum(one[name] for one in found)
      for name, value in found[0].items()
      if isinstance(value, int)
    }
    total['num_skipped'] += len(set(blocks) - set(self.skipped()))
    if len(found) == 1:
      return found[0] | total
    sources = [
      one
      | {
        'source': name,
        'weight': weight,
        'epochs': num_tokens * weight / one['train_tokens'],
      }
      for one, weight, name in zip(found, self.weights, self.names, strict=True)
    ]
    return {
      **total,
      'name': ', '.join(self.names),
      'sha256': self.sha256,
      'tokenizer': found[0]['tokenizer'],
      'sources': sources,
    }


def epochs_line(mixture: Mixture, tokens: int) -> str:
  """A line for people if training repeats its text often, '' if not.

  Above four epochs, repetition is worth clearly less than new text (Muennighoff
  et al., arXiv 2305.16264).
  """
  epochs = tokens / mixture.num_train_tokens
  if epochs <= MANY_EPOCHS:
    return ''
  return (
    f'NOTE: {tokens:,} tokens of training are {epochs:,.0f} epochs of this text'
  )


def check_given(config: config_lib.Config):
  """Raises ValueError if the default text is not meant for the model."""
  data, vocab_size = config.data, config.model.vocab_size
  given = data.path or data.mixture or data.task.name
  if not given and vocab_size > MOST_FOR_BYTES:
    raise ValueError(
      "data.path is empty, which means the bytes of Python's standard library; "
      f'a model of {vocab_size:,} tokens is for another text: give data.path '
      'or data.mixture'
    )


def load(
  config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> Mixture:
  """The text of a run, by `tokenizer` if one is given.

  Raises:
    OSError, ValueError: as `corpus.load`; vocabularies that differ, or do not
      fit the model.
  """
  check_given(config)
  data = config.data
  if data.task.name:
    found = Mixture.of(corpus_lib.of_task(data.task, data.seq_len))
  else:
    found = _load(
      data.sources(),
      data.on_damage,
      data.text_field,
      data.token_dtype,
      tokenizer,
    )
  for corpus in found.corpora:
    corpus_lib.check_vocabulary(corpus, config.model.vocab_size)
  return found


@functools.lru_cache(maxsize=1)
def _load(sources, on_damage, text_field, token_dtype, tokenizer) -> Mixture:
  paths = [path for path, _ in sources]
  found = {}
  # Tokens first: text is then read by their vocabulary.
  for path in sorted(paths, key=corpus_lib.is_tokens, reverse=True):
    found[path] = corpus = corpus_lib.load(
      path, on_damage, text_field, token_dtype, tokenizer
    )
    tokenizer = tokenizer or corpus.tokenizer
  corpora = tuple(found[path] for path in paths)
  unknown = [corpus.name for corpus in corpora if corpus.tokenizer is None]
  if unknown and len(unknown) < len(corpora):
    raise ValueError(
      f'data.mixture: the vocabulary of {unknown[0]} is unknown, that of '
      f'others is not: prepare all of them by one tokenizer.json'
    )
  total = sum(weight for _, weight in sources)
  return Mixture(
    corpora, tuple(weight / total for _, weight in sources), _short(paths)
  )


def _short(paths):
  """The last parts of paths; the whole ones where two share it."""
  short = [pathlib.PurePath(path).name or path for path in paths]
  return tuple(
    name if short.count(name) == 1 else path
    for name, path in zip(short, paths, strict=True)
  )
