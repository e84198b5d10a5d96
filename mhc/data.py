"""Text to batches of token rows.

A corpus is two token streams, for training and held out. It comes from
documents, tokenised to bytes as it is read, or from a folder of tokens that
launch/prepare_data.py wrote. Either stream is cut into rows of `seq_len + 1`
tokens that overlap by one: inputs are all but the last, targets all but the
first. Training rows come in an order that is a function of the seed and the
step alone.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import pathlib

import grain
import numpy as np

from mhc import config as config_lib
from mhc import documents as documents_lib
from mhc import tokenizer as tokenizer_lib
from mhc import tokens as tokens_lib


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Token streams of both sides, in shards, and what they were made from."""

  name: str
  train: tuple[np.ndarray, ...]
  heldout: tuple[np.ndarray, ...]
  tokenizer: tokenizer_lib.Tokenizer | None  # None where nobody knows
  num_documents: int
  num_heldout_documents: int
  num_bytes: int
  sha256: str  # of all documents, in order of name

  @property
  def num_train_tokens(self) -> int:
    return sum(map(len, self.train))

  def summary(self) -> dict[str, str | int]:
    return {
      'name': self.name,
      'num_documents': self.num_documents,
      'num_heldout_documents': self.num_heldout_documents,
      'num_bytes': self.num_bytes,
      'sha256': self.sha256,
      'tokenizer': self.tokenizer.name if self.tokenizer else 'unknown',
      'train_tokens': self.num_train_tokens,
      'heldout_tokens': sum(map(len, self.heldout)),
    }


@functools.lru_cache(maxsize=1)
def load(path: str) -> Corpus:
  """Reads the text or the tokens at `path` (see `DataConfig.path`).

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: no text in it, a file that is not UTF-8, damaged tokens.
  """
  if path and tokens_lib.holds(pathlib.Path(path)):
    return _from_tokens(pathlib.Path(path))
  if path:
    name, documents = (
      path,
      [
        document
        for name, file in documents_lib.files(path).items()
        for document, _ in documents_lib.read(name, file)
      ],
    )
  else:
    name = "Python's standard library"
    documents = documents_lib.standard_library()
  documents = sorted(documents_lib.distinct(documents))
  if not documents:
    raise ValueError(f'data.path={path!r} holds no text: every file is empty')
  train, heldout = documents_lib.split(documents)
  digest = hashlib.sha256()
  for document in documents:
    digest.update(document.text)
  tokenizer = tokenizer_lib.Bytes()
  return Corpus(
    name=name,
    train=(tokenizer.encode_documents([d.text for d in train]),),
    heldout=(tokenizer.encode_documents([d.text for d in heldout]),),
    tokenizer=tokenizer,
    num_documents=len(documents),
    num_heldout_documents=len(heldout),
    num_bytes=sum(len(d.text) for d in documents),
    sha256=digest.hexdigest(),
  )


def _from_tokens(path):
  folder = tokens_lib.read(path)
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
  )


def check_vocabulary(corpus: Corpus, vocab_size: int):
  """Raises ValueError if a model of that vocabulary cannot read the corpus."""
  if corpus.tokenizer is not None:
    largest = corpus.tokenizer.num_tokens - 1
  else:
    # Reading all of a large corpus for this would take longer than it is worth.
    shards = (*corpus.train, *corpus.heldout)
    largest = max(int(shard[:10_000_000].max(initial=0)) for shard in shards)
  if largest >= vocab_size:
    raise ValueError(
      f'model.vocab_size={vocab_size} is less than the {largest + 1} tokens '
      f'of {corpus.name}: set it to that, or to the next multiple of 128'
    )


class Rows:
  """Random access to the rows of a token stream, int32 [seq_len + 1] each.

  No row crosses from one shard to the next.
  """

  def __init__(self, shards: Sequence[np.ndarray], seq_len: int, side: str):
    self._shards = tuple(shards)
    self._seq_len = seq_len
    # Rows up to the end of each shard.
    counts = [max(0, len(shard) - 1) // seq_len for shard in self._shards]
    self._ends = np.cumsum(counts)
    if not counts or not self._ends[-1]:
      raise ValueError(
        f'data.seq_len={seq_len} needs more than '
        f'{max(map(len, self._shards), default=0)} tokens of {side} text: '
        'shorten the rows or bring more text'
      )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> np.ndarray:
    number = int(np.searchsorted(self._ends, index, side='right'))
    first = int(self._ends[number - 1]) if number else 0
    start = (index - first) * self._seq_len
    row = self._shards[number][start : start + self._seq_len + 1]
    return row.astype(np.int32)


def train_batches(
  corpus: Corpus, config: config_lib.DataConfig, seed: int
) -> grain.DatasetIterator:
  """Endless int32 [batch_size, seq_len + 1]; its state is the batch's number.

  Every epoch is shuffled anew.
  """
  rows = Rows(corpus.train, config.seq_len, 'training')
  dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
  # Slicing an array is cheaper than handing it to a thread.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(dataset.batch(config.batch_size).to_iter_dataset(options))


def heldout_rows(
  corpus: Corpus, seq_len: int, num_rows: int | None
) -> np.ndarray:
  """Rows spread evenly over the held-out text, int32 [rows, seq_len + 1].

  `num_rows` of them, or all for None and where the text is shorter.
  """
  rows = Rows(corpus.heldout, seq_len, 'held-out')
  count = len(rows) if num_rows is None else min(num_rows, len(rows))
  indices = np.arange(count) * len(rows) // count
  return np.stack([rows[index] for index in indices.tolist()])
