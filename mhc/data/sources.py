"""Where the documents of a corpus come from: a stream that can be gone on with.

Of several machines each reads every n-th file.
"""

import abc
from collections.abc import Iterator
import hashlib
from typing import Any, NamedTuple

from mhc.data import corpus_files
from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.data import formats
from mhc.data import token_file
from mhc.runtime import files as files_lib
from mhc.runtime import paths

# Bytes of text in a byte of a file, about: for numbers of buckets and parts.
EXPANSION = 4
HUB = 'hf://'


class Place(NamedTuple):
  """The document to read next: its file and its number there, from 0.

  A stream adds its own `state`, which JSON can hold.
  """

  file: int = 0
  number: int = 0
  state: Any = None


class Read(NamedTuple):
  """A document and where it was; it takes `size` bytes of its file."""

  document: documents_lib.Document
  size: int
  file: int
  number: int


class Source(abc.ABC):
  """Documents of files, `names`, in a fixed order.

  Attributes:
    names: of all files.
    total: bytes of this machine's files, 0 if unknown.
    num_text_bytes: of the text of all files, about; 0 if unknown.
    summary: a line of what is not as a reader may expect, '' for nothing.
  """

  names: list[str]
  total: int
  num_text_bytes: int
  summary: str = ''

  @abc.abstractmethod
  def read(self, place: Place, log: corruption.SkipLog) -> Iterator[Read]:
    """Yields the documents from `place` on; `log` counts damage from there."""

  @abc.abstractmethod
  def stamp(self, file: int) -> list[int]:
    """What changes when a file does: its size and the time of its change."""

  def after(self, last: Read) -> Place:
    """The place after the document that was just read."""
    return Place(last.file, last.number + 1)


class Files(Source):
  """Documents of every n-th of the files that a path names."""

  def __init__(
    self, path: str, text_field: str, machine: int = 0, num_machines: int = 1
  ):
    self._files = corpus_files.find(path)
    self._text_field = text_field
    self.names = list(self._files.files)
    if num_machines > len(self.names):
      raise ValueError(
        f'{path} has {len(self.names)} files, fewer than the {num_machines} '
        f'machines of --shard: take at most {len(self.names)}'
      )
    self._mine = range(machine, len(self.names), num_machines)
    sizes = [token_file.size_of(self._path(i)) for i in range(len(self.names))]
    self.total = sum(sizes[i] for i in self._mine)
    self.num_text_bytes = sum(
      size * (EXPANSION if _is_compressed(name) else 1)
      for name, size in zip(self.names, sizes, strict=True)
    )
    self.summary = self._files.summary()

  def read(self, place: Place, log: corruption.SkipLog) -> Iterator[Read]:
    for file in self._mine:
      if file < place.file:
        continue
      name = self.names[file]
      skip = place.number if file == place.file else 0
      documents = documents_lib.read(
        name, self._path(file), log, self._text_field
      )
      for number, (document, size) in enumerate(documents):
        if number >= skip:
          document = document._replace(side=self._files.sides[name])
          yield Read(document, size, file, number)
        elif number == skip - 1:
          log.forget()

  def stamp(self, file: int) -> list[int]:
    try:
      return files_lib.stamp(self._path(file))
    except OSError:  # of which the reader says so
      return [0, 0]

  def _path(self, file) -> paths.Path:
    return self._files.files[self.names[file]]


class StandardLibrary(Source):
  """The modules of the running interpreter, a document each."""

  def __init__(self):
    self._documents = sorted(documents_lib.standard_library())
    self.names = ["Python's standard library"]
    self.total = self.num_text_bytes = sum(len(d.text) for d in self._documents)

  def read(self, place: Place, log: corruption.SkipLog) -> Iterator[Read]:
    del log  # nothing is damaged
    for number in range(place.number, len(self._documents)):
      document = self._documents[number]
      yield Read(document, len(document.text), 0, number)

  def stamp(self, file: int) -> list[int]:
    return [self.total, file]


class Hub(Source):
  """Rows of a data set that the `datasets` library streams.

  `path` is as `parse` reads it. Reading goes on with the row after the last.
  """

  def __init__(
    self, path: str, text_field: str, machine: int = 0, num_machines: int = 1
  ):
    name, config, split = parse(path)
    datasets = _library(path)
    rows = datasets.load_dataset(name, config, split=split, streaming=True)
    if num_machines > 1:
      if num_machines > rows.num_shards:
        raise ValueError(
          f'{path} has {rows.num_shards} files, fewer than the {num_machines} '
          f'machines of --shard: take at most {rows.num_shards}'
        )
      rows = rows.shard(num_machines, machine)
    self._rows, self._machine, self._text_field = rows, machine, text_field
    self.names = [f'{path}, part {number}' for number in range(num_machines)]
    self.total = self.num_text_bytes = 0

  def read(self, place: Place, log: corruption.SkipLog) -> Iterator[Read]:
    if place.state is not None:
      self._rows.load_state_dict(place.state)
    name = self.names[self._machine]
    for number, row in enumerate(self._rows, start=place.number):
      yield from (
        Read(document, size, self._machine, number)
        for document, size in documents_lib.of_record(
          f'{name}:{number + 1}',
          row,
          f'{name}, row {number + 1}',
          log,
          self._text_field,
        )
      )

  def after(self, last: Read) -> Place:
    return Place(last.file, last.number + 1, self._rows.state_dict())

  def stamp(self, file: int) -> list[int]:
    return [0, file]


def open_source(
  path: str, text_field: str, machine: int = 0, num_machines: int = 1
) -> Source:
  """The documents of `path`, '' for the standard library."""
  if path.startswith(HUB):
    return Hub(path, text_field, machine, num_machines)
  if path:
    path = paths.given(path, '--path')
    return Files(path, text_field, machine, num_machines)
  return StandardLibrary()


def fingerprint(source: Source) -> str:
  """SHA-256 of the names, sizes and times of all files."""
  digest = hashlib.sha256()
  for file, name in enumerate(source.names):
    digest.update(f'{name} {source.stamp(file)}\n'.encode('utf-8', 'replace'))
  return digest.hexdigest()


def parse(path: str) -> tuple[str, str | None, str]:
  """Splits hf://NAME[@CONFIG]:SPLIT.

  Raises:
    ValueError: no split is given.
  """
  name, _, split = path.removeprefix(HUB).partition(':')
  name, _, config = name.partition('@')
  if not name or not split:
    raise ValueError(
      f'{path!r} names no split: give {HUB}NAME:SPLIT or '
      f'{HUB}NAME@CONFIG:SPLIT, such as {HUB}HuggingFaceFW/fineweb:train'
    )
  return name, config or None, split


def _is_compressed(name):
  suffix, outer = formats.suffixes(name)
  return bool(outer) or suffix in ('.parquet', '.array_record')


def _library(path):
  try:
    import datasets
  except ImportError:
    raise ValueError(
      f'{path} needs the datasets library: pip install datasets'
    ) from None
  return datasets
