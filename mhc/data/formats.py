"""What a file of documents is, by its content and its name.

    json_lines     an object a line           .jsonl .ndjson .jsonlines .json
    json_array     an array of objects        .json
    parquet        a row each                 any name, by its first bytes
    array_record   a record each              .array_record
    text           one document               any other name

any of them but Parquet and ArrayRecord also compressed by gzip, zstd, bzip2 or
xz, known by the first bytes. Names count in any case. A file under another name
whose first lines are JSON objects is JSON lines too. What is none of these is
refused: nothing is read as a format that it is not.
"""

import bz2
import gzip
import io
import json
import lzma
import pathlib
import sys
from typing import Literal, NamedTuple
import zlib

from mhc.runtime import paths
from mhc.runtime import retry

HEAD = 2**16  # bytes of a file by which it is told
JSON_NAMES = ('.jsonl', '.ndjson', '.jsonlines', '.json')
COMPRESSED_NAMES = ('.gz', '.zst', '.zstd', '.bz2', '.xz')
READ = (
  'text, JSON lines, JSON arrays (these also as .gz, .zst, .bz2, .xz), Parquet '
  'and ArrayRecord'
)
_COMPRESSION = {
  b'\x1f\x8b': 'gzip',
  b'\x28\xb5\x2f\xfd': 'zstd',
  b'BZh': 'bzip2',
  b'\xfd7zXZ\0': 'xz',
}
_OTHERS = {
  b'%PDF': 'a PDF',
  b'PK\x03\x04': 'a zip archive',
  b'ARROW1': "an Arrow file, such as datasets' save_to_disk writes",
  b'\x93NUMPY': 'a numpy array',
  b'\x89HDF': 'an HDF5 file',
  b'\xff\xfe': 'UTF-16: convert it with iconv',
  b'\xfe\xff': 'UTF-16: convert it with iconv',
}
_TABLES = ('.csv', '.tsv')

Kind = Literal['text', 'json_lines', 'json_array', 'parquet', 'array_record']


class Format(NamedTuple):
  kind: Kind
  compression: str = ''


class Refused(Exception):
  """Says in one line what a file is, and that it is not read."""


def detect(file: paths.Path) -> Format:
  """Tells the format of a file.

  Raises:
    Refused: it is none that is read.
    OSError: it cannot be read.
  """
  with retry.stream(file) as stream:
    head = stream.read(HEAD)
  suffix, outer = suffixes(file.name)
  if suffix == '.array_record' and not outer:
    return Format('array_record')
  if head.startswith(b'PAR1') or (suffix == '.parquet' and not outer):
    return Format('parquet')
  compression = _first_of(_COMPRESSION, head)
  if outer and not compression and head:
    raise Refused(f'is not compressed, as {outer} says')
  if compression:
    with open_stream(file, compression) as stream:
      head = _start(stream)
  return Format(_kind(suffix, head), compression)


def suffixes(name: str) -> tuple[str, str]:
  """What a name says of the content and, '' for none, of compression."""
  *_, inner, last = '', '', *pathlib.PurePath(name.lower()).suffixes
  return (inner, last) if last in COMPRESSED_NAMES else (last, '')


def open_stream(file: paths.Path, compression: str = '') -> io.BufferedIOBase:
  """Opens a file for reading what it holds, decompressed.

  Raises:
    Refused: a library is missing.
  """
  stream = retry.stream(file)
  match compression:
    case 'gzip':
      return gzip.GzipFile(fileobj=stream)
    case 'bzip2':
      return bz2.BZ2File(stream)
    case 'xz':
      return lzma.LZMAFile(stream)
    case 'zstd':
      return _zstd(stream)
  return stream


def _zstd(stream):
  try:
    import zstandard  # optional
  except ImportError:
    raise Refused('needs pip install zstandard') from None
  decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
  reader = decompressor.stream_reader(stream, read_across_frames=True)
  return io.BufferedReader(reader, 2**20)


def damaged() -> tuple[type[Exception], ...]:
  """What decompressors raise for a stream that is cut short or damaged."""
  found = EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error
  if 'zstandard' in sys.modules:
    found += (sys.modules['zstandard'].ZstdError,)
  return found


def _start(stream):
  """The first bytes, as far as they can be decompressed."""
  try:
    return stream.read(HEAD)
  except damaged():
    return b''


def _first_of(table, head):
  return next(
    (name for start, name in table.items() if head.startswith(start)), ''
  )


def _kind(suffix: str, head: bytes) -> Kind:
  """Tells the format of what is decompressed."""
  other = _first_of(_OTHERS, head)
  if other:
    raise Refused(f'is {other}; read are {READ}')
  if b'\0' in head:
    raise Refused(f'is not text (it has zero bytes); read are {READ}')
  if suffix in _TABLES:
    raise Refused(f'is a table ({suffix}): make it JSON lines or Parquet')
  start = head.lstrip(b'\xef\xbb\xbf \t\r\n')
  if suffix == '.json' and start.startswith(b'['):
    return 'json_array'
  if suffix in JSON_NAMES:
    if suffix == '.json' and start and not _objects(head, 1):
      raise Refused(
        'is JSON, but neither an object a line nor an array of them'
      )
    return 'json_lines'
  return 'json_lines' if _objects(head, 2) else 'text'


def _objects(head, least):
  """Whether the first lines, that many or all there are, are JSON objects."""
  *lines, rest = head.split(b'\n')
  if len(head) < HEAD or not lines:  # else it is cut short
    lines.append(rest)
  lines = [line for line in lines if line.strip()][:least]
  try:
    return bool(lines) and all(
      isinstance(json.loads(line), dict) for line in lines
    )
  except (ValueError, RecursionError):
    return False
