"""Rows of tokens from streams of them.

Each stream is cut into rows of `seq_len + 1` tokens that overlap by one: inputs
are all but the last, targets all but the first. Rows beside each other form
blocks, which are read at once. A corrupted row that is skipped is replaced by
another, chosen by a hash of its number.
"""

from collections.abc import Sequence
import hashlib

from jaxtyping import Integer
import numpy as np

from mhc.data import corruption
from mhc.data import questions
from mhc.data import token_file

# Replacements tried for a corrupted row.
ATTEMPTS = 100


class Rows:
  """Random access to the rows of a token stream, int32 [seq_len + 1] each.

  No row spans two shards, and no block: what is left of a shard belongs to
  none. A corrupted row is replaced by one chosen by a hash of its number: the
  next row would be repeated often where much is corrupted.
  """

  def __init__(
    self,
    shards: Sequence[token_file.Tokens | questions.Rows],
    seq_len: int,
    name: str,
    num_tokens: int,
    block_rows: int = 1,
  ):
    """Tokens must be below `num_tokens`; `name` is for messages."""
    self._shards = tuple(shards)
    self._seq_len, self._name, self._num_tokens = seq_len, name, num_tokens
    # Number of rows up to the end of each shard.
    counts = [max(0, len(shard) - 1) // seq_len for shard in self._shards]
    self._ends = np.cumsum(counts)
    # Likewise of blocks.
    self._block_rows = block_rows
    self._block_ends = np.cumsum([count // block_rows for count in counts])
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

  @property
  def num_blocks(self) -> int:
    """Raises ValueError if there is none."""
    if not self._block_ends[-1]:
      raise ValueError(
        f'data.block_rows={self._block_rows} rows are more than a file of '
        f'{self._name} has: reduce data.block_rows'
      )
    return int(self._block_ends[-1])

  def block(self, index: int) -> Integer[np.ndarray, 'rows length']:
    """The rows of a block, by one read; by one each where it is corrupted.

    In the type of the file, which takes less memory.
    """
    shard, first = _place(self._block_ends, index)
    start = first * self._block_rows * self._seq_len
    size = self._block_rows * self._seq_len
    try:
      tokens = self._read(self._shards[shard], start, size + 1)
    except corruption.Skipped:
      before = int(self._ends[shard - 1]) if shard else 0
      row = before + first * self._block_rows
      return np.stack([self[row + i] for i in range(self._block_rows)])
    inputs = tokens[:-1].reshape(self._block_rows, self._seq_len)
    last = tokens[self._seq_len :: self._seq_len]
    return np.concatenate([inputs, last[:, None]], axis=1)

  def _place(self, index):
    shard, row = _place(self._ends, index)
    return self._shards[shard], row * self._seq_len

  def _row(self, index):
    shard, start = self._place(index)
    return self._read(shard, start, self._seq_len + 1).astype(np.int32)

  def _read(self, shard, start, size):
    row = shard[start : start + size]
    if (largest := row.max()) >= self._num_tokens:
      # The embedding lookup would clamp it to the last token.
      where = self._name if isinstance(shard, np.ndarray) else shard
      raise ValueError(
        f'{where}: token {largest}, in the {size} from position {start} on, is '
        f'not below {self._num_tokens}: set model.vocab_size to what the '
        'tokens need, or prepare the data again'
      )
    return row


def _place(ends, index):
  """The shard of an index, and its number there."""
  shard = int(np.searchsorted(ends, index, side='right'))
  return shard, index - (int(ends[shard - 1]) if shard else 0)
