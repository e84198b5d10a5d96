"""Reads with exponential backoff on transient errors of a shared file system.

Reads are explicit: an error in a memory map would end the process by a signal.
"""

from collections.abc import Callable
import errno
import io
import os
import pathlib
import sys
import time

import tqdm

# Seconds before each retry, about a minute in total.
BACKOFF_SECONDS = (0.5, 1, 2, 4, 8, 16, 32)
TRANSIENT_ERRNOS = {
  errno.EAGAIN,
  errno.EBUSY,
  errno.ECONNABORTED,
  errno.ECONNREFUSED,
  errno.ECONNRESET,
  errno.EHOSTDOWN,
  errno.EHOSTUNREACH,
  errno.EIO,
  errno.ENETDOWN,
  errno.ENETRESET,
  errno.ENETUNREACH,
  errno.ENOBUFS,
  errno.ENOLINK,
  errno.ENOTCONN,
  errno.EPROTO,
  errno.ESHUTDOWN,
  errno.ESTALE,
  errno.ETIMEDOUT,
}

sleep = time.sleep  # replaced in tests


def with_retries[T](function: Callable[[], T], what: str | pathlib.Path) -> T:
  """Returns `function()`, called again after transient errors.

  Every retry is logged.

  Raises:
    OSError: another error, or one that persists, with `what` as its file.
  """
  waits = iter(BACKOFF_SECONDS)
  while True:
    try:
      return function()
    except OSError as error:
      wait = next(waits, None) if error.errno in TRANSIENT_ERRNOS else None
      if wait is None:
        if error.errno is not None and error.filename is None:
          error.filename = str(what)
        raise
      tqdm.tqdm.write(
        f'{what}: {error.strerror}, trying again in {wait:g} s',
        file=sys.stderr,
      )
    sleep(wait)


class File(io.RawIOBase):
  """A read-only file with retries, for random access or sequential reads.

  It is opened at the first read, and again after an error. Threads may call
  `pread` at a time.
  """

  def __init__(self, path: pathlib.Path):
    self._path, self._descriptor, self._position = path, None, 0

  def pread(self, first: int, size: int) -> bytes:
    """Returns `size` bytes from `first` on, fewer only at the file's end."""
    return with_retries(lambda: self._pread(first, size), self._path)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    match whence:
      case os.SEEK_CUR:
        offset += self._position
      case os.SEEK_END:
        offset += with_retries(self._path.stat, self._path).st_size
    if offset < 0:
      raise ValueError(f'{self._path} has no byte {offset}')
    self._position = offset
    return offset

  def readinto(self, buffer) -> int:
    data = self.pread(self._position, len(buffer))
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)

  def close(self):
    self._descriptor = None
    super().close()

  def _pread(self, first, size):
    descriptor = self._descriptor = self._descriptor or _Descriptor(self._path)
    try:
      data = os.pread(descriptor.number, size, first)
      while len(data) < size and (
        more := os.pread(descriptor.number, size - len(data), first + len(data))
      ):
        data += more
      return data
    except OSError:
      self._descriptor = None
      raise


class _Descriptor:
  """A descriptor that is closed when the last thread has done with it."""

  def __init__(self, path):
    self.number = None
    self.number = os.open(path, os.O_RDONLY)

  def __del__(self):
    if self.number is not None:
      os.close(self.number)


def stream(path: pathlib.Path) -> io.BufferedReader:
  """Opens a file for buffered reads, by lines or seeking."""
  return io.BufferedReader(File(path), 2**20)
