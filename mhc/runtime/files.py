"""Output files of a run: JSON lines, atomically replaced files, TensorBoard."""

from collections.abc import Mapping
import contextlib
import errno
import json
import math
import os
import pathlib
import uuid

import numpy as np

from mhc.runtime import console


class JsonLines:
  """A file of one JSON object a line, each with a `step`.

  On resume, lines past the restored step, or more than `most`, are dropped, as
  is a line that a killed process left half-written. Numbers that are not finite
  become null.
  """

  def __init__(
    self,
    path: pathlib.Path,
    last_step: int | None = None,
    most: int | None = None,
  ):
    kept = read_lines(path)[:most]
    if last_step is not None:
      kept = [line for line in kept if line['step'] <= last_step]
    text = ''.join(map(_line, kept))
    replace(path, text)
    self._file = path.open('ab', buffering=0)
    self._size, self._waiting, self._name = len(text), b'', path.name

  def write(self, step: int, values: Mapping):
    """Writes a line; on a full disk, as soon as there is room again."""
    first = not self._waiting
    self._waiting += _line({'step': step, **values}).encode()
    try:
      written = self._file.write(self._waiting)
      if written < len(self._waiting):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      with contextlib.suppress(OSError):
        self._file.truncate(self._size)
      if first:
        console.print_line(
          f'NOT WRITTEN: {self._name}: {error}. Its lines wait for room.'
        )
      return
    self._size += written
    self._waiting = b''

  def close(self):
    if self._waiting:
      console.print_line(f'NOT WRITTEN: the last lines of {self._name}')
    self._file.close()


def read_lines(path: pathlib.Path) -> list[dict]:
  """Returns the objects of a JSON-lines file, up to the first broken line."""
  lines = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:
        break
  return lines


def replace(path: pathlib.Path, text: str, *, shared: bool = False):
  """Replaces a file atomically: a killed process leaves the old or the new.

  With `shared`, other processes may do the same at a time.
  """
  middle = f'.{uuid.uuid4().hex}' if shared else ''
  partial = path.with_name(f'{path.name}{middle}.partial')
  partial.write_text(text)
  partial.replace(path)


def replace_array(path: pathlib.Path, array: np.ndarray):
  """`replace` for an array, as a .npy file."""
  partial = path.with_name(path.name + '.partial')
  with partial.open('wb') as file:
    np.save(file, array)
  partial.replace(path)


class TensorBoard:
  """A copy of the scalars for TensorBoard."""

  def __init__(self, workdir: pathlib.Path):
    import tensorboardX  # slow to import and off by default

    self._writer = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))

  def write(self, step: int, values: Mapping):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


def _line(values: Mapping) -> str:
  return json.dumps(jsonable(values), allow_nan=False) + '\n'


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
