"""Files of every format under names that people give them."""

import bz2
import gzip
import io
import json
import lzma

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest
import zstandard

from mhc.data import corruption
from mhc.data import documents
from mhc.data import formats

TEXTS = ['one', 'zwei\n', 'träs "q"']
COMPRESS = {
  '': bytes,
  '.gz': gzip.compress,
  '.zst': zstandard.compress,
  '.bz2': bz2.compress,
  '.xz': lzma.compress,
}


def lines(field='text'):
  return ''.join(json.dumps({field: text}) + '\n' for text in TEXTS).encode()


def texts(file, **options):
  return [d.text.decode() for d, _ in documents.read('a', file, **options)]


@pytest.mark.parametrize('compressed', COMPRESS)
@pytest.mark.parametrize(
  'name', ['a.jsonl', 'a.NDJSON', 'b.jsonlines', 'c.txt']
)
def test_json_lines_under_any_name(tmp_path, name, compressed):
  file = tmp_path / (name + compressed)
  file.write_bytes(COMPRESS[compressed](lines()))
  assert texts(file) == TEXTS


@pytest.mark.parametrize('compressed', COMPRESS)
def test_text_stays_one_document(tmp_path, compressed):
  """Also where it talks of JSON, or is a number or a list of it."""
  for name, text in (
    ('a.txt', '{"text": "no'),
    ('b.md', 'see\n{"text": "x"}\n'),
    ('c.txt', '[1, 2]\n'),
    ('d', '1\n2\n'),
    ('e.txt', '\ufeffbom and \r\n'),
  ):
    file = tmp_path / (name + compressed)
    file.write_bytes(COMPRESS[compressed](text.encode()))
    assert texts(file) == [text]


def test_frames_one_after_another(tmp_path):
  """As parallel compressors write, and `cat a.gz b.gz`."""
  half = len(lines().splitlines()[0]) + 1
  for suffix in ('.gz', '.zst', '.bz2', '.xz'):
    file = tmp_path / f'a.jsonl{suffix}'
    parts = lines()[:half], lines()[half:]
    file.write_bytes(b''.join(map(COMPRESS[suffix], parts)))
    assert texts(file) == TEXTS


def test_json_arrays_and_objects(tmp_path):
  array = tmp_path / 'a.json'
  array.write_text(json.dumps([{'text': text} for text in TEXTS], indent=1))
  assert texts(array) == TEXTS
  array.write_text(json.dumps(TEXTS))
  assert texts(array) == TEXTS
  array.write_bytes(lines())  # as the hub's older files are
  assert texts(array) == TEXTS
  array.write_text(json.dumps({'text': 'x'}, indent=1))
  with pytest.raises(ValueError, match='neither an object a line nor an array'):
    texts(array)


def test_parquet_is_told_by_its_content(tmp_path):
  file = tmp_path / 'a.bin'
  parquet.write_table(pyarrow.table({'content': TEXTS}), file)
  assert texts(file, text_field='content') == TEXTS
  with pytest.raises(ValueError, match=r"no column 'text' \(data.text_field"):
    texts(file)


def test_the_field_of_the_text_can_be_given(tmp_path):
  file = tmp_path / 'a.jsonl'
  file.write_bytes(lines('content'))
  assert texts(file, text_field='content') == TEXTS
  with pytest.raises(ValueError, match=r"line 1: .*'text' \(data.text_field"):
    texts(file)


@pytest.mark.parametrize(
  ('name', 'content', 'problem'),
  [
    ('a.csv', b'id,text\n1,x\n', r'is a table \(\.csv\)'),
    (
      'a.TSV.gz',
      gzip.compress(b'id\ttext\n', mtime=0),
      r'is a table \(\.tsv\)',
    ),
    ('a.txt', b'PK\x03\x04rest', 'a zip archive; read are text, JSON lines'),
    ('a.pdf', b'%PDF-1.7 rest', 'a PDF'),
    ('a.arrow', b'ARROW1\0\0', 'Arrow'),
    ('a.npy', b'\x93NUMPY\x01', 'numpy'),
    ('a.txt', b'some\0thing', 'zero bytes'),
    ('a.txt', 'hé'.encode('utf-16'), 'UTF-16: convert it with iconv'),
    ('a.txt.gz', gzip.compress(b'a\0b', mtime=0), 'zero bytes'),
    ('a.jsonl.gz', lines(), r'is not compressed, as \.gz says'),
    ('a.txt', 'hé'.encode('latin1'), r'not UTF-8 text \(byte 1\)'),
  ],
)
def test_what_is_not_read_is_refused(tmp_path, name, content, problem):
  file = tmp_path / name
  file.write_bytes(content)
  with pytest.raises(ValueError, match=problem) as error:
    texts(file)
  assert str(file) in str(error.value)
  log = corruption.SkipLog('skip')
  assert texts(file, log=log) == []
  assert log.count == 1


@pytest.mark.parametrize('suffix', ['.gz', '.zst', '.bz2', '.xz'])
def test_streams_that_are_cut_short(tmp_path, suffix):
  """What came before stays, under the policy 'skip'."""
  rng = np.random.default_rng(0)
  long = [rng.bytes(2000).hex() for _ in range(300)]
  data = ''.join(json.dumps({'text': text}) + '\n' for text in long).encode()
  file = tmp_path / f'a.jsonl{suffix}'
  whole = COMPRESS[suffix](data)
  file.write_bytes(whole[: len(whole) // 2])
  if suffix != '.zst':  # whose end may be missing without a sign
    with pytest.raises(ValueError, match='cannot be read'):
      texts(file)
  log = corruption.SkipLog('skip')
  found = texts(file, log=log)
  assert log.count
  assert found == long[: len(found)]


def test_zstd_without_its_library(tmp_path, monkeypatch):
  file = tmp_path / 'a.jsonl.zst'
  file.write_bytes(zstandard.compress(lines()))
  monkeypatch.setitem(__import__('sys').modules, 'zstandard', None)
  with pytest.raises(ValueError, match='needs pip install zstandard'):
    texts(file)


SUFFIXES = ('', '.txt', '.jsonl', '.JSON', '.md', '.dat', '.parquet', '.csv')


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
  st.lists(st.text(st.characters(exclude_categories=['Cs'])), max_size=4),
  st.sampled_from(['lines', 'array', 'parquet', 'text']),
  st.sampled_from(sorted(COMPRESS)),
  st.sampled_from(SUFFIXES),
)
def test_what_comes_out_went_in_or_is_refused(
  tmp_path_factory, given_texts, kind, compressed, suffix
):
  """Under any name; a text that is a JSON object is JSON lines to anyone."""
  file = tmp_path_factory.mktemp('any') / ('a' + suffix + compressed)
  if kind == 'text':
    given_texts = [text for text in given_texts[:1] if '{' not in text]
    data = ''.join(given_texts).encode()
    given_texts = given_texts or ['']
  elif kind == 'lines':
    data = ''.join(json.dumps({'text': t}) + '\n' for t in given_texts).encode()
  elif kind == 'array':
    data = json.dumps([{'text': text} for text in given_texts]).encode()
  else:
    buffer = io.BytesIO()
    column = pyarrow.array(given_texts, pyarrow.string())
    parquet.write_table(pyarrow.table({'text': column}), buffer)
    data, compressed = buffer.getvalue(), ''
  file.write_bytes(COMPRESS[compressed](data))
  try:
    found = texts(file)
  except ValueError:
    return
  if kind == 'array' and suffix != '.JSON':
    # Under another name an array of JSON is a text.
    assert found in ([data.decode()], [])
  elif not data or (kind == 'lines' and not given_texts):
    assert ''.join(found) == ''
  else:
    assert found == given_texts


def test_every_compression_has_a_name():
  assert set(COMPRESS) - {''} <= set(formats.COMPRESSED_NAMES)
