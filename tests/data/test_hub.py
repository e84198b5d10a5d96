"""Streams of Hugging Face, here of files on disk."""

import json

import pytest

from mhc.data import corruption
from mhc.data import sources
from mhc.data import token_dataset
from mhc.data import tokenize_corpus

datasets = pytest.importorskip('datasets')  # not in tests/versions


@pytest.fixture
def stream(tmp_path, monkeypatch):
  """A data set of three files of 40 rows each, and its path."""
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setattr(
    datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache')
  )
  folder = tmp_path / 'rows'
  folder.mkdir()
  for number in range(3):
    lines = (
      json.dumps({'content': f'file {number} row {row}'}) for row in range(40)
    )
    (folder / f'train-{number}.jsonl').write_text('\n'.join(lines))
  return f'hf://{folder}:train'


def read(path, place=None, machine=0, num_machines=1):
  source = sources.open_source(path, 'content', machine, num_machines)
  log = corruption.SkipLog()
  for one in source.read(place or sources.Place(), log):
    yield source, one


def test_a_stream_goes_on_where_it_was(stream):
  texts = [one.document.text for _, one in read(stream)]
  assert len(set(texts)) == 120
  for number in (1, 40, 57, 119):
    reading = read(stream)
    for _ in range(number):
      source, one = next(reading)
    # As it is kept in a record.
    place = sources.Place(*json.loads(json.dumps(source.after(one))))
    rest = [one.document.text for _, one in read(stream, place)]
    assert rest == texts[number:]


def test_machines_share_a_stream(stream):
  texts = {one.document.text for _, one in read(stream)}
  parts = [
    [one.document.text for _, one in read(stream, None, machine, 3)]
    for machine in range(3)
  ]
  assert [len(part) for part in parts] == [40, 40, 40]
  assert set().union(*parts) == texts
  with pytest.raises(ValueError, match=r'fewer than the 4 machines'):
    next(read(stream, None, 0, 4))


def test_a_stream_is_prepared(stream, tmp_path, small_parts):
  small_parts(part=400, bucket=10_000)
  index = tokenize_corpus.prepare(
    stream, tmp_path / 'out', 'bytes', text_field='content', workers=1
  )
  assert index['num_documents'] == 120
  found = token_dataset.read(tmp_path / 'out')
  assert sum(map(len, found.train)) + sum(map(len, found.heldout)) == sum(
    len(one.document.text) + 2 for _, one in read(stream)
  )
  with pytest.raises(ValueError, match=r"line|row 1: not .*'text'"):
    tokenize_corpus.prepare(stream, tmp_path / 'other', 'bytes', workers=1)


def test_a_stream_names_its_split():
  assert sources.parse('hf://a/b:train') == ('a/b', None, 'train')
  assert sources.parse('hf://a/b@en:train[:10%]') == (
    'a/b',
    'en',
    'train[:10%]',
  )
  for path in ('hf://a/b', 'hf://:train', 'hf://'):
    with pytest.raises(ValueError, match='names no split'):
      sources.parse(path)
