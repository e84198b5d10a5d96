"""Files that are written whole: replaced at once, read with one clear error."""

from collections.abc import Mapping
import contextlib
import json
import math
import os
import pathlib
from typing import IO, Any
import uuid

import numpy as np

_NUMBERS = range(2, 10**4)


def replace(path: pathlib.Path, text: str, *, shared: bool = False):
  """Replaces a file: a kill, or a loss of power, leaves the old or the new.

  With `shared`, other processes may do the same at a time.
  """
  _replace(path, lambda file: file.write(text.encode()), shared)


def replace_array(path: pathlib.Path, array: np.ndarray):
  """`replace` for an array, as a .npy file."""
  _replace(path, lambda file: np.save(file, array), False)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it holds something else; the message names the file.
  """
  data = path.read_bytes()
  try:
    values = json.loads(data)
  except (ValueError, RecursionError) as error:
    what = 'is empty' if not data.strip() else f'is not JSON ({error})'
    raise ValueError(f'{path} is damaged: it {what}') from None
  if not isinstance(values, dict):
    found = json.dumps(values)[:30]
    raise ValueError(f'{path} is damaged: it holds {found}, not an object')
  return values


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a file to NAME.old, NAME.old-2, ...; returns its new path."""
  names = (f'{path.name}.old', *(f'{path.name}.old-{n}' for n in _NUMBERS))
  target = next(p for n in names if not (p := path.with_name(n)).exists())
  return path.rename(target)


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


def _replace(path, write, shared):
  middle = f'.{uuid.uuid4().hex}' if shared else ''
  partial = path.with_name(f'{path.name}{middle}.partial')
  try:
    with partial.open('wb') as file:
      write(file)
      sync(file)
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise
