"""Reads with exponential backoff on transient errors of a shared file system.

Reads are explicit: an error in a memory map would end the process by a signal.
The services of buckets raise errors of many classes, here `OSError`s.
"""

from collections.abc import Callable
import errno
import io
import os
import sys
import time

import tqdm

from mhc.runtime import paths

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

# Packages whose errors are those of a bucket's service.
SERVICES = {'aiohttp', 'botocore', 'aiobotocore', 'gcsfs', 'google', 'requests'}
STREAM_BYTES, BUCKET_STREAM_BYTES = 2**20, 2**24

sleep = time.sleep  # replaced in tests


def with_retries[T](function: Callable[[], T], what: str | paths.Path) -> T:
  """Returns `function()`, called again after transient errors.

  Every retry is logged.

  Raises:
    OSError: another error, or one that persists, with `what` as its file.
  """
  waits = iter(BACKOFF_SECONDS)
  while True:
    try:
      return as_os_error(function, what)
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


def as_os_error[T](function: Callable[[], T], what: str | paths.Path) -> T:
  """Returns `function()`, whose errors of a service become `OSError`s."""
  try:
    return function()
  except OSError:
    raise
  except Exception as error:
    if type(error).__module__.partition('.')[0] not in SERVICES:
      raise
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    raise OSError(errno.EIO, reason, str(what)) from error


class File(io.RawIOBase):
  """A read-only file with retries, for random access or sequential reads.

  It is opened at the first read, and again after an error. Threads may call
  `pread` at a time.
  """

  def __init__(self, path: paths.Path):
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
        offset += with_retries(lambda: self._opened().size(), self._path)
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

  def _opened(self):
    if self._descriptor is None:
      bucket = paths.in_bucket(self._path)
      self._descriptor = (_Object if bucket else _Descriptor)(self._path)
    return self._descriptor

  def _pread(self, first, size):
    try:
      return self._opened().pread(first, size)
    except OSError:
      self._descriptor = None
      raise


class _Descriptor:
  """A descriptor that is closed when the last thread has done with it."""

  def __init__(self, path):
    self._number = None
    self._number = os.open(path, os.O_RDONLY)

  def size(self):
    return os.fstat(self._number).st_size

  def pread(self, first, size):
    data = os.pread(self._number, size, first)
    while len(data) < size and (
      more := os.pread(self._number, size - len(data), first + len(data))
    ):
      data += more
    return data

  def __del__(self):
    if self._number is not None:
      os.close(self._number)


class _Object:
  """An object in a bucket, read by ranges."""

  def __init__(self, path):
    self._system, self._name = paths.filesystem(path), str(path)
    self._size = int(self._system.info(self._name)['size'])

  def size(self):
    return self._size

  def pread(self, first, size):
    last = min(first + size, self._size)  # beyond it a service refuses
    if last <= first:
      return b''
    return self._system.cat_file(self._name, first, last)


def stream(path: paths.Path) -> io.BufferedReader:
  """Opens a file for buffered reads, by lines or seeking."""
  bucket = paths.in_bucket(path)
  size = BUCKET_STREAM_BYTES if bucket else STREAM_BYTES
  return io.BufferedReader(File(path), size)
