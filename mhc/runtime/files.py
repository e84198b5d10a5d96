"""Files that are written whole: replaced at once, read with one clear error.

Those of a bucket appear when their upload is complete, so they need no rename;
one that moves is copied, and then deleted.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import IO, Any
import uuid
import zlib

import numpy as np

from mhc.runtime import paths
from mhc.runtime import retry

_NUMBERS = range(2, 10**4)


def replace(path: paths.Path, text: str, *, shared: bool = False):
  """Replaces a file: a kill, or a loss of power, leaves the old or the new.

  With `shared`, other processes may do the same at a time.
  """
  with replacing(path, shared=shared) as file:
    file.write(text.encode())


def replace_array(path: paths.Path, array: np.ndarray):
  """`replace` for an array, as a .npy file."""
  with replacing(path) as file:
    np.save(file, array)


@contextlib.contextmanager
def replacing(path: paths.Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
  """A file to be written, which then takes the place of `path`, as `replace`.

  Its data wait on this machine's disk until then.
  """
  if paths.in_bucket(path):
    with tempfile.NamedTemporaryFile() as file:
      yield file
      file.flush()
      put = paths.filesystem(path).put_file
      retry.with_retries(lambda: put(file.name, str(path)), path)
    return
  middle = f'.{uuid.uuid4().hex}' if shared else ''
  partial = path.with_name(f'{path.name}{middle}.partial')
  try:
    with partial.open('wb') as file:
      yield file
      sync(file)
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


@contextlib.contextmanager
def here(path: paths.Path) -> Iterator[pathlib.Path]:
  """The file on this machine, for what reads by the system: a copy, if need be.

  Raises:
    OSError: there is none.
  """
  if not paths.in_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder, path.name)
    get = paths.filesystem(path).get_file
    retry.with_retries(lambda: get(str(path), str(copy)), path)
    yield copy


def size(path: paths.Path) -> int:
  """Bytes of a file."""
  return stamp(path)[0]


def stamp(path: paths.Path) -> list[int]:
  """What changes when a file does: its size, and the time or the digest.

  Raises:
    OSError: it cannot be looked at.
  """
  if paths.in_bucket(path):
    info = retry.with_retries(
      lambda: paths.filesystem(path).info(str(path)), path
    )
    tag = info.get('etag') or info.get('ETag') or str(info.get('mtime'))
    return [int(info['size']), zlib.crc32(tag.encode())]
  status = retry.with_retries(path.stat, path)
  return [status.st_size, status.st_mtime_ns]


def read_json(path: paths.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds something else; the message names the file.
  """
  data = retry.with_retries(path.read_bytes, path)
  try:
    values = json.loads(data)
  except (ValueError, RecursionError) as error:
    what = 'is empty' if not data.strip() else f'is not JSON ({error})'
    raise ValueError(f'{path} is damaged: it {what}') from None
  if not isinstance(values, dict):
    found = json.dumps(values)[:30]
    raise ValueError(f'{path} is damaged: it holds {found}, not an object')
  return values


def set_aside(path: paths.Path) -> paths.Path:
  """Moves a file to NAME.old, NAME.old-2, ...; returns its new path."""
  names = (f'{path.name}.old', *(f'{path.name}.old-{n}' for n in _NUMBERS))
  target = next(p for n in names if not (p := path.with_name(n)).exists())
  return move(path, target)


def all_files(path: paths.Path) -> list[paths.Path]:
  """All files in a folder and its folders, in order."""
  if not paths.in_bucket(path):
    return sorted(file for file in path.rglob('*') if file.is_file())
  find = paths.filesystem(path).find
  return [
    paths.path(f'{paths.BUCKET}://{name}')
    for name in retry.with_retries(lambda: find(str(path)), path)
  ]


def move(path: paths.Path, target: paths.Path) -> paths.Path:
  """Moves a file, or a folder and all that is in it, to a new path."""
  if not paths.in_bucket(path):
    return path.rename(target)
  copy = paths.filesystem(path).cp_file
  for file in all_files(path):
    names = str(file), str(target) + str(file).removeprefix(str(path))
    retry.with_retries(lambda names=names: copy(*names), path)
  delete_tree(path)
  return target


def delete_tree(path: paths.Path):
  """Deletes what is left of a file or folder, as far as that is possible."""
  if not paths.in_bucket(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(OSError):
    for file in all_files(path):
      remove = functools.partial(file.unlink, missing_ok=True)
      retry.with_retries(remove, file)


def jsonable(value):
  """Converts arrays to lists, and non-finite numbers to None."""
  if isinstance(value, Mapping):
    return {key: jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(item) for item in value]
  if hasattr(value, 'dtype'):
    if value.ndim:
      return jsonable(np.asarray(value, np.float64).tolist())
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def sync(file: IO[bytes]):
  """Asks the system to write a file to the disk itself, where it can."""
  file.flush()
  with contextlib.suppress(OSError):  # some file systems cannot
    os.fsync(file.fileno())
