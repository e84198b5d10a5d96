"""Which files a path names, which of them hold documents, on which side.

A path is a file, a folder (none of its hidden files; links are followed, every
folder and file once) or a pattern. Left out of a folder or pattern, and said:

* beside files of records (JSON lines, Parquet, ArrayRecord) what describes
  them: README.md, LICENSE, dataset_infos.json, scripts;
* where files are named for splits, such as train-00000.parquet, test.jsonl or
  validation/a.txt: the test split. The validation split is the held-out text,
  all others are for training.
"""

import glob
import os
import pathlib
import re
from typing import Literal, NamedTuple

from mhc.data import formats
from mhc.runtime import paths
from mhc.runtime import retry

# '' is a file whose documents are split by their names.
Side = Literal['', 'train', 'heldout']
SHOWN = 3

_SPLIT = re.compile(
  r'(?:^|[-_./])(train|training|validation|valid|val|dev|test|testing)'
  r'(?=$|[-_.\d/])'
)
_SIDES = {'tr': 'train', 'va': 'heldout', 'de': 'heldout', 'te': 'test'}
_RECORDS = (*formats.JSON_NAMES, '.parquet', '.array_record')
_TEXTS = ('.txt', '.text')
_DESCRIPTIONS = ('readme', 'license', 'dataset_info', 'state.json')


class Files(NamedTuple):
  """The files of a path by their names.

  Attributes:
    files: in the order in which they are read.
    sides: of each.
    left_out: names of files that are not read, by the reason.
  """

  files: dict[str, paths.Path]
  sides: dict[str, Side]
  left_out: dict[str, list[str]]

  def summary(self) -> str:
    """One line of what is not as a reader may expect, '' for nothing."""
    parts = [
      f'{len(names)} left out as {why}: {", ".join(names[:SHOWN])}'
      + ', ...' * (len(names) > SHOWN)
      for why, names in self.left_out.items()
    ]
    heldout = sum(side == 'heldout' for side in self.sides.values())
    if heldout:
      parts.insert(0, f'{heldout} files named for validation are held out')
    return '; '.join(parts)


def find(path: str) -> Files:
  """The files of a path.

  A dangling link counts as a file, one that cannot be read.

  Raises:
    FileNotFoundError: there is no such file.
    OSError: a folder cannot be read.
  """
  root = paths.path(path)
  if retry.with_retries(root.is_file, root):
    return Files({root.name: root}, {root.name: ''}, {})
  of = _objects if paths.in_bucket(root) else _files
  found = dict(sorted(retry.with_retries(lambda: of(root, path), root).items()))
  if not found:
    raise FileNotFoundError(
      f'data.path={path!r} names no file: give a text file, a folder of them '
      "or a quoted pattern such as 'texts/**/*.txt'"
    )
  left_out = {}
  others = _without_documents(found)
  if len(others) < len(found):
    _leave_out(found, left_out, 'no documents', others)
  sides = _sides(found)
  test = [name for name, side in sides.items() if side == 'test']
  _leave_out(found, left_out, 'the test split', test)
  # Held-out ones first: of copies the first one stays.
  order = sorted(found, key=lambda name: (sides[name] != 'heldout', name))
  files = {name: found[name] for name in order}
  return Files(files, {name: sides[name] for name in order}, left_out)


def _files(root, path) -> dict[str, pathlib.Path]:
  if root.is_dir():
    found = {str(file.relative_to(root)): file for file in _walk(root)}
  else:
    names = glob.glob(path, recursive=True)
    found = {name: pathlib.Path(name) for name in names}
  return {
    name: file
    for name, file in found.items()
    if file.is_file() or (file.is_symlink() and not file.exists())
  }


def _objects(root, path) -> dict[str, paths.Path]:
  """Those of a bucket, in a folder or of a pattern; hidden ones left out."""
  system = paths.filesystem(root)
  if glob.has_magic(path):
    names = system.glob(path, detail=True)
    names = [name for name, info in names.items() if info['type'] == 'file']
    return {name: paths.path(f'{paths.BUCKET}://{name}') for name in names}
  start = len(system._strip_protocol(path)) + 1
  found = {name[start:]: name for name in system.find(path)}
  return {
    name: paths.path(f'{paths.BUCKET}://{full}')
    for name, full in found.items()
    if name and not any(part.startswith('.') for part in name.split('/'))
  }


def _leave_out(found, left_out, why, names):
  for name in names:
    del found[name]
  if names:
    left_out[why] = names


def _sides(found):
  """The side of each file, 'test' for none; all '' without named splits."""
  named = {}
  # What all are in says nothing of splits.
  common = len(os.path.commonpath([os.path.dirname(name) for name in found]))
  for name in found:
    match = _SPLIT.findall(name[common:].lower())
    named[name] = _SIDES[match[-1][:2]] if match else ''
  has = set(named.values())
  if 'train' not in has or not has & {'heldout', 'test'}:
    return dict.fromkeys(found, '')
  if 'heldout' in has:
    return {name: side or 'train' for name, side in named.items()}
  return {name: side if side == 'test' else '' for name, side in named.items()}


def _without_documents(found):
  """Names of what describes files of records, and of JSON that is none."""
  kinds = {name: _kind(name, file) for name, file in found.items()}
  if 'records' in kinds.values():
    return [name for name, kind in kinds.items() if kind in (None, 'json')]
  return [name for name, kind in kinds.items() if kind == 'json']


def _kind(name, file):
  """'records', 'text', or 'json' for JSON of no records; None for others."""
  base, (suffix, _) = (
    pathlib.PurePath(name).name.lower(),
    formats.suffixes(name),
  )
  if base.startswith(_DESCRIPTIONS):
    return None
  if suffix == '.json':
    try:
      formats.detect(file)
    except formats.Refused:
      return 'json'
    except OSError:  # of which the reader says so
      pass
    return 'records'
  if suffix in _RECORDS:
    return 'records'
  return 'text' if suffix in _TEXTS else None


def _walk(root):
  def refuse(error):
    raise error

  seen = set()
  for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
    folders[:] = [
      name for name in sorted(folders) if _first_time(folder, name, seen)
    ]
    for name in sorted(names):
      if _first_time(folder, name, seen):
        yield pathlib.Path(folder, name)


def _first_time(folder, name, seen):
  """Whether what this stands for has not come yet; hidden things never do."""
  if name.startswith('.'):
    return False
  try:
    status = os.stat(os.path.join(folder, name))
  except OSError:
    return True  # a dangling link, of which the reader says so
  place = status.st_dev, status.st_ino
  new = place not in seen
  seen.add(place)
  return new
