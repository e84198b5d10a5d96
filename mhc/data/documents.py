"""Documents from files of text, JSON, Parquet and ArrayRecord (`formats`).

The text of a record is under `text_field`; an ArrayRecord's record is the text
itself. Parquet needs pyarrow, ArrayRecord array_record, zstd zstandard.

About one document in twenty is held out, chosen by a hash of its name, so that
the split depends neither on order nor on what else is in the folder; unless the
files are named for splits (`corpus_files`). A corrupted record keeps its
number, so the names of the others do not change.
"""

from collections.abc import Callable, Iterator, Sequence
import hashlib
import json
import pathlib
import sysconfig
from typing import Any, NamedTuple

from mhc.data import corpus_files
from mhc.data import corruption
from mhc.data import formats
from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import retry

TEXT = 'text'
HELD_OUT = 20  # one document in so many


class Document(NamedTuple):
  name: str
  text: bytes
  side: corpus_files.Side = ''  # '' to be split by its name


def read_all(
  files: corpus_files.Files,
  log: corruption.SkipLog | None = None,
  text_field: str = TEXT,
  progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Document]:
  """Yields the documents of files, calling `progress` with the bytes read."""
  for name, file in files.files.items():
    for document, size in read(name, file, log, text_field):
      yield document._replace(side=files.sides[name])
      progress(size)


def read(
  name: str,
  file: paths.Path,
  log: corruption.SkipLog | None = None,
  text_field: str = TEXT,
) -> Iterator[tuple[Document, int]]:
  """Yields a file's documents, each with the bytes of the file that it takes.

  Documents that `log` skips are missing.

  Raises:
    ValueError: a line, row or file is not UTF-8 text, or the file is of another
      format, and the policy of `log` is 'stop' (the default).
    OSError: the file system is gone.
  """
  log = log or corruption.SkipLog()
  readers = {
    'json_lines': _json_lines,
    'json_array': _json_array,
    'parquet': _parquet,
    'array_record': _array_record,
    'text': _text,
  }
  try:
    found = formats.detect(file)
  except formats.Refused as problem:
    log.report(f'{file} {problem}', [name])
    return
  except OSError as error:
    log.report(f'{file} cannot be read: {corruption.reason(error)}', [name])
    return
  yield from readers[found.kind](name, file, found.compression, log, text_field)


def standard_library() -> list[Document]:
  """The running interpreter's own modules, without tests and odd files."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
  documents = []
  for file in sorted(root.rglob('*.py')):
    name = file.relative_to(root)
    if skipped & set(name.parts):
      continue
    text = file.read_bytes()
    if _clean(text):
      documents.append(Document(str(name), text))
  return documents


def distinct(documents: Sequence[Document]) -> list[Document]:
  """Drops empty documents and exact copies, in the order that they have.

  A copy that is held out wins, then the first.
  """
  kept = {}
  for document in sorted(documents, key=lambda d: not is_held_out(d)):
    if document.text.strip():
      kept.setdefault(document.text, document)
  return [d for d in documents if kept.get(d.text) is d]


def is_held_out(document: Document) -> bool:
  """By its side, else by a hash of its name."""
  if document.side:
    return document.side == 'heldout'
  return _is_held_out_name(document.name)


def split(
  documents: list[Document], skipped: Sequence[str] = ()
) -> tuple[list[Document], list[Document]]:
  """Returns (train, held out); a single document has its last 1/20 held out.

  Documents that have a side are on it. `skipped` documents, given by name, do
  not change the side of the others.

  Raises:
    ValueError: all documents of one side were skipped.
  """
  if any(d.side for d in documents):
    heldout = {d.name for d in documents if d.side == 'heldout'}
  else:
    names = {d.name for d in documents}.union(skipped)
    if len(names) == 1:
      return _cut(documents[0])
    heldout = set(filter(_is_held_out_name, names))
    if not heldout or heldout == names:
      heldout = {min(names, key=_hash)}
  sides = (
    [d for d in documents if d.name not in heldout],
    [d for d in documents if d.name in heldout],
  )
  if not all(sides):
    side = 'training' if sides[1] else 'evaluation'
    what = f'damaged, such as {min(skipped)}' if skipped else 'empty, or a copy'
    raise ValueError(
      f'all text that is for {side} is {what}: repair it, or name what is good '
      "by a pattern such as data.path='texts/**/*.txt'"
    )
  return sides


def _cut(document):
  """The last 1/20 of a document is held out."""
  text = document.text
  cut = len(text) - max(1, len(text) // HELD_OUT)
  while cut and text[cut] & 0xC0 == 0x80:  # not inside a character
    cut -= 1
  return (
    [document._replace(text=text[:cut])],
    [document._replace(text=text[cut:])],
  )


def _text(name, file, compression, log, text_field):
  del text_field
  try:
    with formats.open_stream(file, compression) as stream:
      text = retry.with_retries(stream.read, file)
  except (OSError, *formats.damaged()) as error:
    log.report(f'{file} cannot be read: {corruption.reason(error)}', [name])
    return
  size = _size(file) if compression else len(text)
  yield from _document(name, text, str(file), log, size)


def _json_lines(name, file, compression, log, text_field):
  number = 0
  try:
    with formats.open_stream(file, compression) as lines:
      for line in lines:
        number += 1
        if not line.strip():
          continue
        name_, where = f'{name}:{number}', f'{file}, line {number}'
        try:
          record = json.loads(line)
        except (ValueError, RecursionError) as error:
          log.report(f'{where}: {_no_text(text_field, error)}', [name_])
          continue
        yield from of_record(name_, record, where, log, text_field, len(line))
  except (OSError, *formats.damaged()) as error:
    log.report(
      f'{file}, after line {number}, cannot be read: '
      f'{corruption.reason(error)}',
      [f'{name}:{number + 1}'],
    )


def _json_array(name, file, compression, log, text_field):
  try:
    with formats.open_stream(file, compression) as stream:
      records = json.loads(retry.with_retries(stream.read, file))
  except (OSError, ValueError, RecursionError, *formats.damaged()) as error:
    log.report(f'{file} cannot be read: {corruption.reason(error)}', [name])
    return
  each = _size(file) // max(1, len(records))
  for number, record in enumerate(records, start=1):
    name_, where = f'{name}:{number}', f'{file}, record {number}'
    if isinstance(record, str):
      record = {text_field: record}
    yield from of_record(name_, record, where, log, text_field, each)


def of_record(
  name: str,
  record: Any,
  where: str,
  log: corruption.SkipLog,
  text_field: str = TEXT,
  size: int = 0,
) -> Iterator[tuple[Document, int]]:
  """Yields the document of a record, if it has one, or reports that."""
  try:
    text = record[text_field]
  except (KeyError, TypeError) as error:
    log.report(f'{where}: {_no_text(text_field, error)}', [name])
    return
  yield from _document(name, text, where, log, size, text_field)


def _no_text(text_field, error):
  return (
    f'not a JSON object with {text_field!r} (data.text_field, '
    f'--text_field): {corruption.reason(error)}'
  )


def _size(file):
  return files_lib.size(file)


def _parquet(name, file, compression, log, text_field):
  del compression  # its own
  try:
    import pyarrow  # optional
    from pyarrow import parquet
  except ImportError:
    raise ValueError(f'{file}: Parquet needs pip install pyarrow') from None
  try:
    size = _size(file)
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
  if text_field not in columns:
    problem = f'has no column {text_field!r} (data.text_field, --text_field)'
    log.report(f'{file} {problem}, only {columns}', [name])
    return
  each = size // max(1, sum(counts))
  end = 0
  for group, count in enumerate(counts):
    number, end = end, end + count
    batches = table.iter_batches(256, [group], [text_field], use_threads=False)
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
        name_ = f'{name}:{number}'
        yield from _document(name_, text, where, log, each, text_field)


def _array_record(name, file, compression, log, text_field):
  del compression, text_field  # a record is a text
  if paths.in_bucket(file):
    raise ValueError(f'{file}: ArrayRecord is read from disks: copy it to one')
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
    size = _size(file)
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


def _document(name, text, where, log, size, text_field=TEXT):
  """Yields the document, or reports why it is not text."""
  if isinstance(text, str):
    text = text.encode('utf-8', 'replace')
  try:
    text.decode()
  except AttributeError:
    problem = f': {text_field!r} is of type {type(text).__name__}, not a string'
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


def _is_held_out_name(name: str) -> bool:
  return _hash(name) % HELD_OUT == 0


def _hash(name: str) -> int:
  return int(
    hashlib.sha1(name.encode(errors='surrogateescape')).hexdigest(), 16
  )
