"""Append-only files of one JSON object a line, which a resumed run continues.

A checkpoint holds the `position` of each file: its size and digest. A run that
resumes from it finds these bytes and drops what follows, the lines of steps
that it repeats. Where they are not there (deleted, emptied, altered), it says
so, sets the file aside and goes on with the lines that can be read. In a bucket
they are written by a `shadow`, and uploaded when a position is asked for.
"""

from collections.abc import Mapping
import contextlib
import errno
import hashlib
import json
import os
from typing import Any

from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import paths
from mhc.runtime import retry
from mhc.runtime import shadow


class JsonLines:
  """A file of one JSON object a line, each with a `step`.

  Numbers that are not finite become null.
  """

  def __init__(
    self,
    path: paths.Path,
    last_step: int,
    position: Mapping[str, Any] | None = None,
  ):
    """Opens the file of a run that goes on after `last_step`.

    `dropped` then holds the lines of later steps.

    Args:
      path: of the file, which need not exist.
      last_step: lines of later steps are dropped.
      position: what `position` returned at that step; None if unknown.
    """
    self.damage = ''  # what was found, for people
    self._path, local = path, shadow.of_file(path)
    data = local.read_bytes() if local.exists() else b''
    matches = position is not None and _matches(data, position)
    # What matches is not read line by line, which a long run would wait for.
    lines = _parse(data[position['size'] :] if matches else data)
    self.dropped = [line for line in lines if line['step'] > last_step]
    if matches:
      data = data[: position['size']]
    else:
      kept = [line for line in lines if line['step'] <= last_step]
      if position is not None:
        self.damage = _set_aside(path, position, len(kept))
      data = b''.join(map(_line, kept))
      files.replace(local, data.decode())
    self._file = local.open('r+b', buffering=0)
    self._file.truncate(len(data))
    self._file.seek(len(data))
    self._size, self._waiting, self._name = len(data), b'', path.name
    self._lines, self._digest = data.count(b'\n'), hashlib.sha256(data)

  def write(self, step: int, values: Mapping):
    """Writes a line; on a full disk, as soon as there is room again."""
    first = not self._waiting
    line = _line({'step': step, **values})
    self._waiting += line
    self._lines += 1
    self._digest.update(line)
    try:
      written = self._file.write(self._waiting)
      if written < len(self._waiting):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(self._size)
        self._file.seek(self._size)
      if first:
        console.print_line(
          f'NOT WRITTEN: {self._name}: {error}. Its lines wait for room.'
        )
      return
    self._size += written
    self._waiting = b''

  def position(self) -> dict[str, Any]:
    """What has been written by now, for `__init__`, once it is saved."""
    self.save()
    return {
      'lines': self._lines,
      'size': self._size + len(self._waiting),
      'sha256': self._digest.hexdigest(),
    }

  def save(self):
    """Brings what has been written to the disk itself, or to the bucket."""
    files.sync(self._file)
    shadow.upload(self._path)

  def close(self):
    if self._waiting:
      console.print_line(f'NOT WRITTEN: the last lines of {self._name}')
    self._file.close()
    shadow.upload(self._path)


def read_lines(path: paths.Path) -> list[dict[str, Any]]:
  """The objects of a JSON-lines file; lines that are broken are left out."""
  if not retry.with_retries(path.exists, path):
    return []
  return _parse(retry.with_retries(path.read_bytes, path))


def _matches(data, position) -> bool:
  known = data[: position['size']]
  return hashlib.sha256(known).hexdigest() == position['sha256']


def _parse(data: bytes) -> list[dict[str, Any]]:
  found = []
  for line in data.splitlines():
    with contextlib.suppress(ValueError, RecursionError):
      values = json.loads(line)
      if isinstance(values, dict) and isinstance(values.get('step'), int):
        found.append(values)
  return found


def _set_aside(path, position, kept) -> str:
  what = (
    f'{path} does not hold the {position["lines"]} lines that it was saved '
    f'with: {kept} of them can be read'
  )
  if not path.exists():
    what = f'{path} is gone, and with it {position["lines"]} lines'
  elif files.size(path):
    what += f'. It is kept as {files.set_aside(path).name}'
  console.print_line(f'RECORDS LOST: {what}; the run goes on.')
  return what


def _line(values: Mapping) -> bytes:
  return (json.dumps(files.jsonable(values), allow_nan=False) + '\n').encode()
