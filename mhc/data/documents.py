"""Documents from files: text, JSON lines, Parquet, ArrayRecord.

    *.jsonl          an object a line, its text under `text`
    *.parquet        a row each, in the column `text`      (needs pyarrow)
    *.array_record   a record each, the text itself        (needs array_record)
    anything else    one UTF-8 document

About one document in twenty is held out, chosen by a hash of its name, so that
the split depends neither on order nor on what else is in the folder. A
corrupted record keeps its number, so the names of the others do not change.
"""

from collections.abc import Iterator, Sequence
import glob
import hashlib
import json
import os
import pathlib
import sysconfig
from typing import NamedTuple

from mhc.data import corruption
from mhc.runtime import retry

TEXT = 'text'
HELD_OUT = 20  # one document in so many


class Document(NamedTuple):
  name: str
  text: bytes


def files(path: str) -> dict[str, pathlib.Path]:
  """Maps names to files: one, those of a folder (none hidden) or of a pattern.

  A dangling link counts as a file, one that cannot be read.

  Raises:
    FileNotFoundError: there is no such file.
    OSError: a folder cannot be read.
  """
  root = pathlib.Path(path)
  if root.is_file():
    found = {root.name: root}
  elif root.is_dir():
    found = {
      str(file.relative_to(root)): file
      for file in retry.with_retries(lambda: list(_walk(root)), root)
      if not any(p.startswith('.') for p in file.relative_to(root).parts)
    }
  else:
    found = {
      name: pathlib.Path(name) for name in glob.glob(path, recursive=True)
    }
  found = {
    name: file
    for name, file in found.items()
    if retry.with_retries(file.is_file, file)
    or (file.is_symlink() and not file.exists())
  }
  if not found:
    raise FileNotFoundError(
      f'data.path={path!r} names no file: give a text file, a folder of them '
      "or a quoted pattern such as 'texts/**/*.txt'"
    )
  return dict(sorted(found.items()))


def read(
  name: str, file: pathlib.Path, log: corruption.SkipLog | None = None
) -> Iterator[tuple[Document, int]]:
  """Yields a file's documents, each with the bytes of the file that it takes.

  Documents that `log` skips are missing.

  Raises:
    ValueError: a line, row or file is not UTF-8 text, and the policy of `log`
      is 'stop' (the default).
    OSError: the file system is gone.
  """
  formats = {
    '.jsonl': _json_lines,
    '.parquet': _parquet,
    '.array_record': _array_record,
  }
  log = log or corruption.SkipLog()
  yield from formats.get(file.suffix, _text)(name, file, log)


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
  """Drops empty documents and exact copies; the first name wins."""
  first = {d.text: d for d in sorted(documents, reverse=True) if d.text.strip()}
  return list(first.values())


def is_held_out(name: str) -> bool:
  return _hash(name) % HELD_OUT == 0


def split(
  documents: list[Document], skipped: Sequence[str] = ()
) -> tuple[list[Document], list[Document]]:
  """Returns (train, held out); a single document has its last 1/20 held out.

  `skipped` documents, given by name, do not change the side of the others.

  Raises:
    ValueError: all documents of one side were skipped.
  """
  names = {d.name for d in documents}.union(skipped)
  if len(names) == 1:
    name, text = documents[0]
    cut = len(text) - max(1, len(text) // HELD_OUT)
    while cut and text[cut] & 0xC0 == 0x80:  # not inside a character
      cut -= 1
    return [Document(name, text[:cut])], [Document(name, text[cut:])]
  heldout = set(filter(is_held_out, names))
  if not heldout or heldout == names:
    heldout = {min(names, key=_hash)}
  sides = (
    [d for d in documents if d.name not in heldout],
    [d for d in documents if d.name in heldout],
  )
  if not all(sides):
    side = 'training' if sides[1] else 'evaluation'
    raise ValueError(
      f'all text that is for {side} is damaged, such as {min(skipped)}: repair '
      "it, or name what is good by a pattern such as data.path='texts/**/*.txt'"
    )
  return sides


def _walk(root):
  def refuse(error):
    raise error

  for folder, _, names in os.walk(root, onerror=refuse):
    yield from (pathlib.Path(folder, name) for name in names)


def _text(name, file, log):
  try:
    text = retry.with_retries(file.read_bytes, file)
  except OSError as error:
    log.report(f'{file} cannot be read: {corruption.reason(error)}', [name])
    return
  yield from _document(name, text, str(file), log, len(text))


def _json_lines(name, file, log):
  number = 0
  try:
    with retry.stream(file) as lines:
      for line in lines:
        number += 1
        if not line.strip():
          continue
        name_, where = f'{name}:{number}', f'{file}, line {number}'
        try:
          text = json.loads(line)[TEXT]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
          problem = (
            f'not a JSON object with {TEXT!r}: {corruption.reason(error)}'
          )
          log.report(f'{where}: {problem}', [name_])
          continue
        yield from _document(name_, text, where, log, len(line))
  except OSError as error:
    log.report(
      f'{file}, after line {number}, cannot be read: '
      f'{corruption.reason(error)}',
      [f'{name}:{number + 1}'],
    )


def _parquet(name, file, log):
  try:
    import pyarrow  # optional
    from pyarrow import parquet
  except ImportError:
    raise ValueError(f'{file}: Parquet needs pip install pyarrow') from None
  try:
    size = retry.with_retries(file.stat, file).st_size
    table = parquet.ParquetFile(
      retry.stream(file), page_checksum_verification=True
    )
    columns = table.schema_arrow.names
    counts = [
      table.metadata.row_group(group).num_rows
      for group in range(table.num_row_groups)
    ]
  except Exception as error:  # pyarrow has a class for each kind of corruption
    problem = corruption.reason(error)
    log.report(f'{file} is not a readable Parquet file: {problem}', [name])
    return
  if TEXT not in columns:
    log.report(f'{file} has no column {TEXT!r}, only {columns}', [name])
    return
  each = size // max(1, sum(counts))
  end = 0
  for group, count in enumerate(counts):
    number, end = end, end + count
    batches = table.iter_batches(256, [group], [TEXT], use_threads=False)
    while number < end:
      try:
        column = next(batches).column(0)
        if pyarrow.types.is_dictionary(column.type):
          column = column.dictionary_decode()
        if pyarrow.types.is_unicode(column.type):
          column = column.cast('binary')  # decoded one by one below
        elif pyarrow.types.is_large_unicode(column.type):
          column = column.cast('large_binary')
        texts = column.to_pylist()
      except Exception as error:
        problem = corruption.reason(error)
        if isinstance(error, StopIteration):
          problem = 'they are missing'
        log.report(
          f'{file}, rows {number + 1} to {end}, cannot be read: {problem}',
          (f'{name}:{row + 1}' for row in range(number, end)),
        )
        break
      for text in texts:
        number += 1
        where = f'{file}, row {number}'
        yield from _document(f'{name}:{number}', text, where, log, each)


def _array_record(name, file, log):
  try:
    from array_record.python import array_record_module  # optional
  except ImportError:
    raise ValueError(
      f'{file}: ArrayRecord needs pip install array_record'
    ) from None

  def reader_from(number):
    reader = array_record_module.ArrayRecordReader(str(file))
    reader.seek(number)
    return reader

  try:
    size = retry.with_retries(file.stat, file).st_size
    reader = reader_from(0)
    count = reader.num_records()
    assert count, 'no records'
  except Exception as error:  # likewise; a corrupted file may also seem empty
    problem = corruption.reason(error)
    log.report(f'{file} is not a readable ArrayRecord file: {problem}', [name])
    return
  for number in range(1, count + 1):
    name_, where = f'{name}:{number}', f'{file}, record {number}'
    try:
      text = reader.read()
    except Exception as error:
      log.report(f'{where} cannot be read: {corruption.reason(error)}', [name_])
      reader = reader_from(number)  # it reads nothing after an error
      continue
    yield from _document(name_, text, where, log, size // count)
  reader.close()


def _document(name, text, where, log, size):
  """Yields the document, or reports why it is not text."""
  if isinstance(text, str):
    text = text.encode('utf-8', 'replace')
  try:
    text.decode()
  except AttributeError:
    problem = f': {TEXT!r} is of type {type(text).__name__}, not a string'
  except UnicodeDecodeError as error:
    problem = f' is not UTF-8 text (byte {error.start}): convert it with iconv'
  else:
    yield Document(name, text), size
    return
  log.report(f'{where}{problem}', [name])


def _clean(text: bytes) -> bool:
  """UTF-8 of 200 B to 200 kB, no NUL, no line above 2,000 bytes."""
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  longest = max(map(len, text.split(b'\n')))
  return 200 <= len(text) <= 200_000 and b'\0' not in text and longest <= 2_000


def _hash(name: str) -> int:
  return int(
    hashlib.sha1(name.encode(errors='surrogateescape')).hexdigest(), 16
  )
