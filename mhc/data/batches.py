"""Batches of token rows from text.

A corpus is two token streams, for training and held out. It is read from
documents, tokenised to bytes on the fly, or from a token folder written by
launch/prepare_data.py. Each stream is cut into rows of `seq_len + 1` tokens
that overlap by one: inputs are all but the last, targets all but the first. The
order of training rows is a function of the seed and the step alone; a corrupted
row that is skipped is replaced by another, chosen by a hash of its number.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import pathlib
from typing import NamedTuple

import grain
import numpy as np

from mhc import config as config_lib
from mhc.data import corpus_files
from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.data import token_dataset
from mhc.data import token_file
from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import console

# Replacements tried for a corrupted row.
ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The token streams of both sides, in shards, and their origin."""

  name: str
  train: tuple[token_file.Tokens, ...]
  heldout: tuple[token_file.Tokens, ...]
  tokenizer: tokenizer_lib.Tokenizer | None  # None if unknown
  num_documents: int
  num_heldout_documents: int
  num_bytes: int
  sha256: str  # of all documents, in order of name
  num_skipped_before: int = 0  # when the tokens were prepared
  log: corruption.SkipLog = dataclasses.field(
    default_factory=corruption.SkipLog
  )

  @property
  def num_skipped(self) -> int:
    """Number of corrupted records, blocks and files that were skipped.

    A block of tokens counts once it has been read.
    """
    return self.num_skipped_before + self.log.count

  @property
  def num_train_tokens(self) -> int:
    return sum(map(len, self.train))

  def summary(self) -> dict[str, str | int]:
    return {
      'name': self.name,
      'num_documents': self.num_documents,
      'num_heldout_documents': self.num_heldout_documents,
      'num_skipped': self.num_skipped,
      'num_bytes': self.num_bytes,
      'sha256': self.sha256,
      'tokenizer': self.tokenizer.name if self.tokenizer else 'unknown',
      'train_tokens': self.num_train_tokens,
      'heldout_tokens': sum(map(len, self.heldout)),
    }


@functools.lru_cache(maxsize=1)
def load(
  path: str,
  on_damage: str = 'stop',
  text_field: str = documents_lib.TEXT,
  token_dtype: str = '',
  tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> Corpus:
  """Reads the text or the tokens at `path` (see `DataConfig`).

  Text is tokenised by `tokenizer`, by default to bytes; tokens must be of that
  vocabulary, if one is given and theirs is known.

  Raises:
    FileNotFoundError: nothing is at `path`.
    OSError: it cannot be read; names `data.path`.
    ValueError: it holds no text; something is corrupted or not UTF-8 and
      `on_damage` is 'stop', or nothing else remains; another vocabulary.
  """
  try:
    log = corruption.SkipLog(on_damage)
    if path and token_dataset.holds(pathlib.Path(path)):
      return _from_tokens(pathlib.Path(path), log, token_dtype, tokenizer)
    return _from_text(path, log, text_field, tokenizer or tokenizer_lib.Bytes())
  except OSError as error:
    if 'data.path' in str(error):
      raise
    raise type(error)(
      f'data.path={path!r} cannot be read ({error}): give a file, a folder or '
      'a pattern'
    ) from error


def _from_text(path, log, text_field, tokenizer) -> Corpus:
  if path:
    files = corpus_files.find(path)
    if files.summary():
      console.print_line(f'{path}: {files.summary()}')
    name = path
    documents = list(documents_lib.read_all(files, log, text_field))
  else:
    name = "Python's standard library"
    documents = documents_lib.standard_library()
  documents = sorted(documents_lib.distinct(documents))
  if not documents:
    why = log.summary() or 'every file is empty'
    raise ValueError(f'data.path={path!r} holds no text: {why}')
  if log.count:
    console.print_line(log.summary())
  train, heldout = documents_lib.split(documents, log.names)
  digest = hashlib.sha256()
  for document in documents:
    digest.update(document.text)
  return Corpus(
    name=name,
    train=(tokenizer.encode_documents([d.text for d in train]),),
    heldout=(tokenizer.encode_documents([d.text for d in heldout]),),
    tokenizer=tokenizer,
    num_documents=len(documents),
    num_heldout_documents=len(heldout),
    num_bytes=sum(len(d.text) for d in documents),
    sha256=digest.hexdigest(),
    log=log,
  )


def _from_tokens(path, log, token_dtype, tokenizer) -> Corpus:
  folder = token_dataset.read(path, log, token_dtype)
  known = folder.tokenizer
  if tokenizer and known and tokenizer.description != known.description:
    raise ValueError(
      f'data.path={str(path)!r} holds tokens of another vocabulary '
      f'({known.num_tokens:,} tokens of {known.name}) than the run '
      f'({tokenizer.num_tokens:,} of {tokenizer.name}): give text, or prepare '
      "it again by the run's tokenizer.json"
    )
  return Corpus(
    name=folder.index['name'],
    train=folder.train,
    heldout=folder.heldout,
    tokenizer=folder.tokenizer,
    **{
      name: folder.index[name]
      for name in (
        'num_documents',
        'num_heldout_documents',
        'num_bytes',
        'sha256',
      )
    },
    num_skipped_before=folder.index['num_skipped'],
    log=log,
  )


def load_for(
  config: config_lib.Config, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> Corpus:
  """Loads the text of a run and checks its vocabulary; see `load`."""
  data = config.data
  corpus = load(
    data.path, data.on_damage, data.text_field, data.token_dtype, tokenizer
  )
  check_vocabulary(corpus, config.model.vocab_size)
  return corpus


def check_vocabulary(corpus: Corpus, vocab_size: int):
  """Raises ValueError if a token is not below `vocab_size`.

  Without a known tokenizer only the start of each shard is checked; `Rows`
  checks the rest as it is read.
  """
  if corpus.tokenizer is not None:
    largest = corpus.tokenizer.num_tokens - 1
  else:
    largest = max(map(_largest, (*corpus.train, *corpus.heldout)))
  if largest >= vocab_size:
    raise ValueError(
      f'model.vocab_size={vocab_size} is less than the {largest + 1} tokens '
      f'of {corpus.name}: set it to that, or to the next multiple of 128'
    )


def _largest(shard):
  try:
    return int(shard[:10_000_000].max(initial=0))
  except corruption.Skipped:
    return 0


class Rows:
  """Random access to the rows of a token stream, int32 [seq_len + 1] each.

  No row spans two shards. A corrupted row is replaced by one chosen by a hash
  of its number: the next row would be repeated often where much is corrupted.
  """

  def __init__(
    self,
    shards: Sequence[token_file.Tokens],
    seq_len: int,
    name: str,
    num_tokens: int,
  ):
    """Tokens must be below `num_tokens`; `name` is for messages."""
    self._shards = tuple(shards)
    self._seq_len, self._name, self._num_tokens = seq_len, name, num_tokens
    # Number of rows up to the end of each shard.
    counts = [max(0, len(shard) - 1) // seq_len for shard in self._shards]
    self._ends = np.cumsum(counts)
    if not counts or not self._ends[-1]:
      raise ValueError(
        f'data.seq_len={seq_len} needs more than '
        f'{max(map(len, self._shards), default=0)} tokens of {name}: '
        'reduce data.seq_len or give more text'
      )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> np.ndarray:
    """Raises ValueError for corruption that stops the run."""
    row = index
    for attempt in range(ATTEMPTS):
      try:
        return self._row(row)
      except corruption.Skipped:
        digest = hashlib.sha1(f'{index} {attempt}'.encode()).digest()
        row = int.from_bytes(digest) % len(self)
    shard, _ = self._place(index)
    raise ValueError(
      f'{self._name}: all {ATTEMPTS} rows tried are damaged, such as one '
      f'of {shard}: prepare the data again'
    )

  def _place(self, index):
    number = int(np.searchsorted(self._ends, index, side='right'))
    first = int(self._ends[number - 1]) if number else 0
    return self._shards[number], (index - first) * self._seq_len

  def _row(self, index):
    shard, start = self._place(index)
    row = shard[start : start + self._seq_len + 1]
    if (largest := row.max()) >= self._num_tokens:
      # The embedding lookup would clamp it to the last token.
      where = self._name if isinstance(shard, np.ndarray) else shard
      raise ValueError(
        f'{where}: token {largest}, in the row from position {start} on, is '
        f'not below {self._num_tokens}: set model.vocab_size to what the '
        'tokens need, or prepare the data again'
      )
    return row.astype(np.int32)


def train_batches(
  corpus: Corpus, config: config_lib.DataConfig, seed: int, vocab_size: int
) -> grain.DatasetIterator:
  """Endless batches, int32 [batch_size, seq_len + 1].

  The iterator's state is the number of the batch; every epoch is reshuffled.
  """
  rows = _rows(corpus, 'train', config.seq_len, vocab_size)
  dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
  # Slicing an array is cheaper than handing it to a thread.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(
    dataset.batch(config.batch_size, drop_remainder=True).to_iter_dataset(
      options
    )
  )


def heldout_rows(
  corpus: Corpus, seq_len: int, num_rows: int | None, vocab_size: int
) -> np.ndarray:
  """Rows spread evenly over the held-out text, int32 [rows, seq_len + 1].

  `num_rows` of them; all if it is None or the text has fewer.
  """
  rows = _rows(corpus, 'heldout', seq_len, vocab_size)
  count = len(rows) if num_rows is None else min(num_rows, len(rows))
  indices = np.arange(count) * len(rows) // count
  return np.stack([rows[index] for index in indices.tolist()])


class Heldout(NamedTuple):
  """Held-out rows of a run, int32 [rows, seq_len + 1]."""

  periodic: np.ndarray  # `eval_sequences` of them
  final: np.ndarray  # `final_sequences`


def heldout_for(config: config_lib.Config, corpus: Corpus) -> Heldout:
  """The held-out rows of a run; see `heldout_rows`."""
  counts = config.eval_sequences, config.final_sequences or None
  seq_len, vocab_size = config.data.seq_len, config.model.vocab_size
  return Heldout(
    *(heldout_rows(corpus, seq_len, count, vocab_size) for count in counts)
  )


def _rows(corpus, side, seq_len, vocab_size):
  if corpus.tokenizer is not None:
    vocab_size = min(vocab_size, corpus.tokenizer.num_tokens)
  what = {'train': 'training', 'heldout': 'held-out'}[side]
  name = f'{what} text of {corpus.name}'
  return Rows(getattr(corpus, side), seq_len, name, vocab_size)
