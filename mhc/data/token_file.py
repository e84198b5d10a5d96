"""A token file, read a row at a time and verified by its CRCs.

FILE.bin comes with FILE.crc, the CRC-32 of each of its blocks as little-endian
uint32. A block is verified when it is first read, which adds nothing to what a
start reads: 128 KiB is also what Linux reads around each touched page of a
memory map. A block is corrupted as a whole or not at all, so what can be read
depends on the files alone, not on what was read before.
"""

import array
import functools
import hashlib
import threading
import zlib

import numpy as np

from mhc.data import corruption
from mhc.runtime import console
from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import retry

BLOCK = 2**17  # bytes
OPEN_FILES = 200
UNREAD, GOOD, BAD = range(3)


class Shard:
  """The tokens of one file, read on demand: `len` and slices."""

  def __init__(
    self,
    file: paths.Path,
    dtype: str,
    offset: int,
    count: int,
    log: corruption.SkipLog,
    digest: str | None = None,
  ):
    """`count` tokens from byte `offset`; `digest` is the SHA-256 of the CRCs.

    Raises:
      ValueError: the file has another size, and the policy of `log` is 'stop'.
    """
    self._file, self._offset, self._count = file, offset, count
    self._dtype = np.dtype(dtype).newbyteorder('<')
    self._log, self._digest = log, digest
    self._size = count * self._dtype.itemsize
    self._lock, self._found_crcs = threading.Lock(), None
    self._state = np.zeros(-(-self._size // BLOCK), np.uint8)  # UNREAD
    found, want = size_of(file), offset + self._size
    if found != want:
      self._report(f' has {found} bytes instead of {want}')
      self._state[max(0, found - offset) // BLOCK :] = BAD

  def __len__(self) -> int:
    return self._count

  def __str__(self) -> str:
    return str(self._file)

  def __getitem__(self, window: slice) -> np.ndarray:
    """Returns the tokens of a slice without steps.

    Raises:
      ValueError: they are corrupted, and the policy is 'stop'.
      corruption.Skipped: they are in a corrupted block, and the policy 'skip'.
    """
    first, last = (
      n * self._dtype.itemsize for n in window.indices(self._count)[:2]
    )
    if last <= first:
      return np.zeros(0, self._dtype)
    blocks = range(first // BLOCK, (last - 1) // BLOCK + 1)
    if all(self._state[block] == GOOD for block in blocks):
      data = self._read(first, last)
    else:
      data = self._verified(blocks)[first % BLOCK :][: last - first]
    return np.frombuffer(data, self._dtype)

  def _verified(self, blocks):
    """Reads whole blocks by one read, and verifies them if CRCs are known."""
    if any(self._state[block] == BAD for block in blocks):
      raise corruption.Skipped
    first, last = blocks[0] * BLOCK, min((blocks[-1] + 1) * BLOCK, self._size)
    if len(blocks) == 1:
      data = self._read(first, last)
    else:
      try:
        data = _opened(self).pread(self._offset + first, last - first)
      except OSError as error:
        corruption.reason(error)  # raises it if it is of no block
        data = b''
      if len(data) < last - first:  # which block is it?
        data = b''.join(self._read(*self._ends(block)) for block in blocks)
    parts = []
    for block in blocks:
      start, end = (end - first for end in self._ends(block))
      parts.append(self._checked(block, data[start:end]))
    return b''.join(parts)

  def _ends(self, block):
    return block * BLOCK, min((block + 1) * BLOCK, self._size)

  def _checked(self, block, data):
    if self._state[block] == UNREAD:
      if self._digest and zlib.crc32(data) != self._crcs[block]:
        data = self._read(*self._ends(block))  # the read itself may have failed
        if zlib.crc32(data) != self._crcs[block]:
          self._reject(block, 'does not match its CRC-32')
      self._state[block] = GOOD
    return data

  def _read(self, first, last):
    try:
      data = _opened(self).pread(self._offset + first, last - first)
      problem = 'is cut short'
    except OSError as error:
      data, problem = b'', f'cannot be read: {corruption.reason(error)}'
    if len(data) < last - first:
      self._reject((first + len(data)) // BLOCK, problem)
    return data

  @property
  def _crcs(self):
    """CRCs of all blocks; -1, which matches none, where one is missing."""
    with self._lock:  # threads read ahead
      if self._found_crcs is None:
        self._found_crcs = self._read_crcs()
      return self._found_crcs

  def _read_crcs(self):
    file = self._file.with_suffix('.crc')
    try:
      data, problem = (
        retry.with_retries(file.read_bytes, file),
        'does not match its digest',
      )
    except OSError as error:
      data, problem = b'', f'is unreadable ({corruption.reason(error)})'
    if hashlib.sha256(data).hexdigest() != self._digest:
      # Blocks that match the remaining CRCs are good nevertheless.
      problem = f' cannot be checked in full, {file.name} {problem}'
      self._report(problem, file.name)
    crcs = np.full(len(self._state), -1)
    found = np.frombuffer(data[: len(data) // 4 * 4], '<u4')[: len(crcs)]
    crcs[: len(found)] = found
    return crcs

  def _reject(self, block, problem):
    """Reports a block and marks it as bad: it is not read again."""
    with self._lock:
      known, self._state[block] = self._state[block] == BAD, BAD
    if not known:
      first = self._offset + block * BLOCK
      problem = f', block {block} (from byte {first} on) {problem}'
      self._report(problem, str(block))
    raise corruption.Skipped

  def _report(self, problem, block=None):
    problem = f'{self._file}{problem}'
    self._log.report(problem, block=block and f'{self._file} {block}')
    if self._log.count.bit_count() == 1:
      console.print_line(
        f'DAMAGED DATA: {problem}; {self._log.count} left out so far'
      )


Tokens = np.ndarray | Shard


@functools.lru_cache(OPEN_FILES)
def _opened(shard):
  return retry.File(shard._file)


class Crcs:
  """The CRC-32 of each block of appended data."""

  def __init__(self):
    self._values, self._room = array.array('I'), 0

  def update(self, data: bytes):
    data = memoryview(data)
    while len(data):
      if not self._room:
        self._values.append(0)
        self._room = BLOCK
      part, data = data[: self._room], data[self._room :]
      self._values[-1] = zlib.crc32(part, self._values[-1])
      self._room -= len(part)

  def tobytes(self) -> bytes:
    return np.array(self._values, '<u4').tobytes()


def size_of(file: paths.Path) -> int:
  """Returns the size of a file in bytes, 0 if it does not exist."""
  try:
    return files_lib.size(file)
  except FileNotFoundError:
    return 0
