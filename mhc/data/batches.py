"""Batches of rows: which rows a step trains on, and their reading ahead.

The order is a function of the seed and the step alone. Blocks of each corpus
are shuffled anew every epoch and mixed by weight into one endless sequence,
which is dealt to the rows of the batch: row s of a batch of B takes the blocks
s, s + B, s + 2 B, ..., and reads through each of them in as many steps as it
has rows. So each process reads only the blocks of its own rows, each once and
whole, and a batch never holds neighbours. With blocks of one row, which is the
default, every epoch is a permutation of all rows.
"""

from collections.abc import Sequence
from concurrent import futures
import sys
import threading
from typing import NamedTuple

import grain
from jaxtyping import Int, Int32, Integer
import numpy as np

from mhc import config as config_lib
from mhc.data import mixture as mixture_lib
from mhc.data import rows as rows_lib

# Threads that read held-out rows.
THREADS = 16


def train_batches(
  mixture: mixture_lib.Mixture,
  config: config_lib.DataConfig,
  seed: int,
  vocab_size: int,
  slots: Sequence[int] | None = None,
) -> grain.DatasetIterator:
  """Endless batches, int32 [slots, seq_len + 1].

  The iterator's state is the number of the batch. Token folders are read
  `config.read_ahead` batches ahead, by as many threads.

  Args:
    mixture: the text.
    config: its settings.
    seed: of the order.
    vocab_size: tokens must be below.
    slots: the rows of the global batch that are wanted, None for all.
  """
  sources = [
    _rows(corpus, 'train', config, vocab_size) for corpus in mixture.corpora
  ]
  steps = _Steps(
    sources,
    Order([source.num_blocks for source in sources], mixture.weights, seed),
    config,
    range(config.batch_size) if slots is None else slots,
  )
  in_memory = all(corpus.in_memory for corpus in mixture.corpora)
  ahead = 0 if in_memory else config.read_ahead
  options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
  return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class Order:
  """The endless sequence of blocks, (corpus, block) each.

  The blocks of a corpus are shuffled anew every epoch. Corpora take turns as
  evenly as their weights allow.
  """

  def __init__(
    self, num_blocks: Sequence[int], weights: Sequence[float], seed: int
  ):
    self._each = [
      grain.MapDataset.range(number).seed(seed + index).shuffle().repeat()
      for index, number in enumerate(num_blocks)
    ]
    self._shares = [max(1, round(weight * 2**32)) for weight in weights]

  def __getitem__(self, index: int) -> tuple[int, int]:
    corpus, number = self.turn(index)
    return corpus, int(self._each[corpus][number])

  def turn(self, index: int) -> tuple[int, int]:
    """The corpus of an element, and the number of its elements before."""
    left = sum(self._shares)
    for corpus, share in enumerate(self._shares[:-1]):
      # Elements before this one, and up to it, that are of later corpora.
      before, after = (
        count * (left - share) // left for count in (index, index + 1)
      )
      if before == after:
        return corpus, index - before
      index, left = before, left - share
    return len(self._shares) - 1, index


class _Steps:
  """The wanted rows of every batch, int32 [slots, seq_len + 1] each."""

  def __init__(self, sources, order, config, slots):
    self._sources, self._order, self._slots = sources, order, slots
    self._batch_size = config.batch_size
    self._block_rows = config.block_rows
    self._blocks = _Blocks(self._read)

  def __len__(self) -> int:
    return sys.maxsize // self._batch_size

  def __getitem__(self, step: int) -> Int32[np.ndarray, 'slots length']:
    rows = [self._row(step, slot) for slot in self._slots]
    return np.stack(rows).astype(np.int32)

  def _row(self, step, slot):
    size = self._block_rows
    if size == 1:
      source, row = self._order[step * self._batch_size + slot]
      return self._sources[source][row]
    # Not all begin a block at a time: some begin in the middle of their first.
    turn, row = divmod(step + slot * size // self._batch_size, size)
    return self._blocks.get(slot, turn)[row]

  def _read(self, slot, turn):
    source, block = self._order[turn * self._batch_size + slot]
    return self._sources[source].block(block)


class _Blocks:
  """The blocks that slots are in, each read by the thread that comes first."""

  def __init__(self, read):
    self._read, self._lock, self._held = read, threading.Lock(), {}

  def get(self, slot: int, turn: int) -> Integer[np.ndarray, 'rows length']:
    with self._lock:
      held = self._held.setdefault(slot, {})
      future, first = held.get(turn), turn not in held
      if first:
        future = held[turn] = futures.Future()
        # Threads that read ahead are at most in the turns beside this one.
        for old in [one for one in held if abs(one - turn) > 1]:
          del held[old]
    if first:
      try:
        future.set_result(self._read(slot, turn))
      except BaseException as error:
        future.set_exception(error)
        with self._lock:
          held.pop(turn, None)
    return future.result()


class Heldout(NamedTuple):
  """Held-out rows of a run, int32 [rows, seq_len + 1], and their corpora."""

  periodic: np.ndarray  # `eval_sequences` of them
  final: np.ndarray  # `final_sequences`
  periodic_sources: np.ndarray
  final_sources: np.ndarray
  names: tuple[str, ...]


def heldout_rows(
  mixture: mixture_lib.Mixture,
  config: config_lib.DataConfig,
  num_rows: int | None,
  vocab_size: int,
) -> tuple[Int32[np.ndarray, 'rows length'], Int[np.ndarray, 'rows']]:
  """Rows spread evenly over the held-out text, and the corpus of each.

  `num_rows` of them, shared out by weight; all if it is None, or of a text that
  has fewer.
  """
  found, of = [], []
  for index, corpus in enumerate(mixture.corpora):
    rows = _rows(corpus, 'heldout', config, vocab_size)
    count = len(rows)
    if num_rows is not None:
      count = min(count, max(1, round(num_rows * mixture.weights[index])))
    indices = (np.arange(count) * len(rows) // count).tolist()
    if corpus.in_memory:
      found += map(rows.__getitem__, indices)
    else:
      with futures.ThreadPoolExecutor(THREADS) as pool:
        found += pool.map(rows.__getitem__, indices)
    of += [index] * count
  return np.stack(found), np.array(of)


def heldout_for(
  config: config_lib.Config, mixture: mixture_lib.Mixture
) -> Heldout:
  """The held-out rows of a run; see `heldout_rows`."""
  (periodic, of_periodic), (final, of_final) = (
    heldout_rows(mixture, config.data, count, config.model.vocab_size)
    for count in (config.eval_sequences, config.final_sequences or None)
  )
  return Heldout(periodic, final, of_periodic, of_final, mixture.names)


def _rows(corpus, side, config, vocab_size):
  if corpus.tokenizer is not None:
    vocab_size = min(vocab_size, corpus.tokenizer.num_tokens)
  what = {'train': 'training', 'heldout': 'held-out'}[side]
  name = f'{what} text of {corpus.name}'
  return rows_lib.Rows(
    getattr(corpus, side),
    config.seq_len,
    name,
    vocab_size,
    config.block_rows if side == 'train' else 1,
  )
