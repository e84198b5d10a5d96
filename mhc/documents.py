"""Documents from files: text, JSON lines, Parquet, ArrayRecord.

    *.jsonl          an object a line, its text under `text`
    *.parquet        a row each, in the column `text`      (needs pyarrow)
    *.array_record   a record each, the text itself        (needs array_record)
    anything else    one UTF-8 document

About one document in twenty is held out, chosen by a hash of its name, so that
the split depends neither on order nor on what else is in the folder.
"""

from collections.abc import Iterator
import glob
import hashlib
import json
import pathlib
import sysconfig
from typing import NamedTuple

TEXT = 'text'
HELD_OUT = 20  # one document in so many


class Document(NamedTuple):
  name: str
  text: bytes


def files(path: str) -> dict[str, pathlib.Path]:
  """Name -> file, of a file, a folder (without hidden ones) or a pattern.

  Raises:
    FileNotFoundError: nothing is there.
  """
  root = pathlib.Path(path)
  if root.is_file():
    found = {root.name: root}
  elif root.is_dir():
    found = {
      str(file.relative_to(root)): file
      for file in root.rglob('*')
      if not any(p.startswith('.') for p in file.relative_to(root).parts)
    }
  else:
    found = {
      name: pathlib.Path(name) for name in glob.glob(path, recursive=True)
    }
  found = {name: file for name, file in found.items() if file.is_file()}
  if not found:
    raise FileNotFoundError(
      f'data.path={path!r} names no file: give a text file, a folder of them '
      "or a quoted pattern such as 'texts/**/*.txt'"
    )
  return dict(sorted(found.items()))


def read(name: str, file: pathlib.Path) -> Iterator[tuple[Document, float]]:
  """A file's documents, each with the bytes of the file that it took.

  Raises:
    ValueError: a line, row or file that is not UTF-8 text.
  """
  match file.suffix:
    case '.jsonl':
      yield from _json_lines(name, file)
    case '.parquet':
      yield from _parquet(name, file)
    case '.array_record':
      yield from _array_record(name, file)
    case _:
      text = file.read_bytes()
      yield Document(name, _utf8(text, str(file))), len(text)


def standard_library() -> list[Document]:
  """The running interpreter's own modules, without tests and odd files."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
  documents = []
  for file in root.rglob('*.py'):
    name = file.relative_to(root)
    if skipped & set(name.parts):
      continue
    text = file.read_bytes()
    if _clean(text):
      documents.append(Document(str(name), text))
  return documents


def distinct(documents: list[Document]) -> list[Document]:
  """Without empty documents and exact copies; the first name wins."""
  first = {d.text: d for d in sorted(documents, reverse=True) if d.text.strip()}
  return list(first.values())


def is_held_out(name: str) -> bool:
  return _hash(name) % HELD_OUT == 0


def split(
  documents: list[Document],
) -> tuple[list[Document], list[Document]]:
  """(train, held out); of a single document the last twentieth is held out."""
  if len(documents) == 1:
    name, text = documents[0]
    cut = len(text) - max(1, len(text) // HELD_OUT)
    while cut and text[cut] & 0xC0 == 0x80:  # not inside a character
      cut -= 1
    return [Document(name, text[:cut])], [Document(name, text[cut:])]
  heldout = {d.name for d in documents if is_held_out(d.name)}
  if not heldout or len(heldout) == len(documents):
    heldout = {min((d.name for d in documents), key=_hash)}
  return (
    [d for d in documents if d.name not in heldout],
    [d for d in documents if d.name in heldout],
  )


def _json_lines(name, file):
  with file.open('rb') as lines:
    for number, line in enumerate(lines, 1):
      if not line.strip():
        continue
      where = f'{file}, line {number}'
      try:
        text = json.loads(line)[TEXT]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f'{where}: not a JSON object with {TEXT!r}: {error!r}'
        ) from None
      yield Document(f'{name}:{number}', _encoded(text, where)), len(line)


def _parquet(name, file):
  try:
    from pyarrow import parquet  # optional
  except ImportError:
    raise ValueError(f'{file}: Parquet needs pip install pyarrow') from None
  try:
    table = parquet.ParquetFile(file)
  except Exception as error:  # pyarrow has a class for each kind of damage
    raise ValueError(f'{file} is not a Parquet file: {error}') from None
  if TEXT not in table.schema_arrow.names:
    raise ValueError(
      f'{file} has no column {TEXT!r}, only {table.schema_arrow.names}'
    )
  each = file.stat().st_size / max(1, table.metadata.num_rows)
  number = 0
  for batch in table.iter_batches(batch_size=256, columns=[TEXT]):
    for text in batch.column(0).to_pylist():
      number += 1
      where = f'{file}, row {number}'
      yield Document(f'{name}:{number}', _encoded(text, where)), each


def _array_record(name, file):
  try:
    from array_record.python import array_record_module  # optional
  except ImportError:
    raise ValueError(
      f'{file}: ArrayRecord needs pip install array_record'
    ) from None
  try:
    reader = array_record_module.ArrayRecordReader(str(file))
    count = reader.num_records()
    assert count, 'no records'
  except Exception as error:  # likewise; a damaged file may also seem empty
    raise ValueError(f'{file} is not an ArrayRecord file: {error}') from None
  for number in range(1, count + 1):
    text = _utf8(reader.read(), f'{file}, record {number}')
    yield Document(f'{name}:{number}', text), file.stat().st_size / count
  reader.close()


def _encoded(text, where):
  if not isinstance(text, str):
    raise ValueError(f'{where}: {TEXT!r} is {text!r}, not a string')
  return text.encode('utf-8', 'replace')


def _utf8(text, where):
  try:
    text.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{where} is not UTF-8 text (byte {error.start}): convert it with iconv, '
      "or leave it out with a pattern such as data.path='texts/**/*.txt'"
    ) from None
  return text


def _clean(text: bytes) -> bool:
  """UTF-8 of 200 B to 200 kB, no NUL, no line above 2,000 bytes."""
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  longest = max(map(len, text.split(b'\n')))
  return 200 <= len(text) <= 200_000 and b'\0' not in text and longest <= 2_000


def _hash(name: str) -> int:
  return int(hashlib.sha1(name.encode()).hexdigest(), 16)
