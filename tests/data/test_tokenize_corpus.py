"""From files of every format to a folder of tokens, and back."""

import json

from array_record.python import array_record_module
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest

from mhc import config
from mhc.data import batches
from mhc.data import corpus as corpus_lib
from mhc.data import documents
from mhc.data import mixture as mixture_lib
from mhc.data import rows as rows_lib
from mhc.data import token_dataset
from mhc.data import tokenize_corpus
from mhc.data import tokenizer

TEXTS = [f'document {number} says {number * 37 % 11}\n' for number in range(90)]


def write(folder, kind):
  """The texts in one file of a format, or one file each."""
  folder.mkdir()
  match kind:
    case 'text':
      for number, text in enumerate(TEXTS):
        (folder / f'{number}.txt').write_text(text)
    case 'jsonl':
      lines = [json.dumps({'id': 0, 'text': text}) + '\n' for text in TEXTS]
      (folder / 'all.jsonl').write_text(''.join([*lines, '\n']))
    case 'parquet':
      table = pyarrow.table({'text': TEXTS, 'id': list(range(len(TEXTS)))})
      parquet.write_table(table, folder / 'all.parquet')
    case 'array_record':
      out = array_record_module.ArrayRecordWriter(
        str(folder / 'all.array_record'), 'group_size:1'
      )
      for text in TEXTS:
        out.write(text.encode())
      out.close()
  return str(folder)


@pytest.mark.parametrize('kind', ['text', 'jsonl', 'parquet', 'array_record'])
def test_every_format_gives_the_same_documents(tmp_path, kind):
  path = write(tmp_path / 'in', kind)
  index = tokenize_corpus.prepare(path, tmp_path / 'out', 'bytes')
  assert index['num_documents'] == 90
  assert index['num_bytes'] == sum(map(len, TEXTS))
  assert 0 < index['num_heldout_documents'] < 20
  corpus = corpus_lib.load(str(tmp_path / 'out'))
  text = b''.join(
    corpus.tokenizer.decode(shard[:])
    for shard in (*corpus.train, *corpus.heldout)
  )
  assert sorted(text.decode().splitlines(True)) == sorted(TEXTS)
  # The same files without preparation hold out the same documents.
  direct = corpus_lib.load(path)
  assert direct.num_heldout_documents == index['num_heldout_documents']
  assert direct.num_bytes == index['num_bytes']


def test_a_learned_vocabulary_is_trained_on(tmp_path):
  path = write(tmp_path / 'in', 'jsonl')
  index = tokenize_corpus.prepare(path, tmp_path / 'out', 'train:280')
  assert index['tokenizer'] == 'tokenizer.json'
  corpus = corpus_lib.load(str(tmp_path / 'out'))
  assert corpus.tokenizer.num_tokens == index['num_tokens']
  assert corpus.num_train_tokens < index['num_bytes']
  rows = batches.train_batches(
    mixture_lib.Mixture.of(corpus), config.DataConfig(seq_len=16), 0, 280
  )
  row = next(rows)[0]
  assert row.max() < index['num_tokens']
  assert b'document' in corpus.tokenizer.decode(row)
  with pytest.raises(ValueError, match=r'vocab_size=270.*280 tokens'):
    corpus_lib.check_vocabulary(corpus, 270)
  # An existing vocabulary, for other text.
  again = tokenize_corpus.prepare(
    path, tmp_path / 'again', str(tmp_path / 'out' / 'tokenizer.json')
  )
  assert again['train'] == index['train']


def test_many_documents_are_streamed_with_the_same_split(tmp_path, small_parts):
  path = write(tmp_path / 'in', 'jsonl')
  few = tokenize_corpus.prepare(path, tmp_path / 'few', 'bytes')
  small_parts(part=500, bucket=300)
  many = tokenize_corpus.prepare(path, tmp_path / 'many', 'bytes', workers=1)
  assert len(few['train']) == 1
  assert len(many['train']) > 5
  for side in token_dataset.SIDES:
    assert sum(few[side]) == sum(many[side])
  corpus = corpus_lib.load(str(tmp_path / 'many'))
  rows = rows_lib.Rows(corpus.train, 20, 'text', 258)
  assert len(rows) == sum((count - 1) // 20 for count in many['train'])
  stacked = np.concatenate([rows[i][:-1] for i in range(len(rows))])
  kept = np.concatenate(
    [shard[: (len(shard) - 1) // 20 * 20] for shard in corpus.train]
  )
  np.testing.assert_array_equal(stacked, kept)


def test_copies_are_dropped_and_one_document_holds_out_its_end(tmp_path):
  file = tmp_path / 'one.jsonl'
  line = json.dumps({'text': 'é' * 300}) + '\n'
  file.write_text(line * 3 + json.dumps({'text': ' '}) + '\n')
  index = tokenize_corpus.prepare(str(file), tmp_path / 'out', 'bytes')
  assert index['num_bytes'] == 600
  assert index['heldout'] == [30 + 2]


def test_token_files_of_others_drop_in(tmp_path):
  """nanoGPT's raw uint16, and llm.c's with a header."""
  values = np.arange(1000, dtype=np.uint16)
  values.tofile(tmp_path / 'train.bin')
  header = np.zeros(256, np.int32)
  header[:3] = 20240520, 1, 1000
  (tmp_path / 'fine_val_0.bin').write_bytes(header.tobytes() + values.tobytes())
  corpus = corpus_lib.load(str(tmp_path))
  np.testing.assert_array_equal(corpus.train[0][:], values)
  np.testing.assert_array_equal(corpus.heldout[0][:], values)
  assert corpus.tokenizer is None
  with pytest.raises(ValueError, match=r'vocab_size=320.*1000 tokens'):
    corpus_lib.check_vocabulary(corpus, 320)
  corpus_lib.check_vocabulary(corpus, 1000)


def test_token_files_of_32_bits(tmp_path):
  """By llm.c's newer header, by the setting, never by chance."""
  values = np.arange(70_000, dtype=np.uint32)
  header = np.zeros(256, np.int32)
  header[:3] = 20240801, 7, len(values)
  for name in ('train.bin', 'val.bin'):
    (tmp_path / name).write_bytes(header.tobytes() + values.tobytes())
  corpus = corpus_lib.load(str(tmp_path))
  np.testing.assert_array_equal(corpus.train[0][:], values)
  with pytest.raises(ValueError, match=r"token_dtype='uint16', but the header"):
    corpus_lib.load(str(tmp_path), token_dtype='uint16')
  for numbers in (values, values % 50_000):  # below 65,536 as well
    for name in ('train.bin', 'val.bin'):
      numbers.tofile(tmp_path / name)
    with pytest.raises(ValueError, match=r"data.token_dtype='uint32'"):
      corpus_lib.load(str(tmp_path))
    corpus = corpus_lib.load(str(tmp_path), token_dtype='uint32')
    np.testing.assert_array_equal(corpus.train[0][:], numbers)
  # What is said is believed.
  halves = corpus_lib.load(str(tmp_path), token_dtype='uint16').train[0]
  assert len(halves) == 2 * len(values)


def test_damage_is_named(tmp_path):
  path = write(tmp_path / 'in', 'text')
  out = tmp_path / 'out'
  tokenize_corpus.prepare(path, out, 'bytes')
  # Once more is no work; for other text it is another folder.
  assert tokenize_corpus.prepare(path, out, 'bytes')['num_documents'] == 90
  (tmp_path / 'in' / '90.txt').write_text('new')
  with pytest.raises(ValueError, match='holds tokens already'):
    tokenize_corpus.prepare(path, out, 'bytes')
  shard = out / 'train-00000.bin'
  shard.write_bytes(shard.read_bytes()[:-2])
  with pytest.raises(ValueError, match=r'bytes instead of .*make it again'):
    token_dataset.read(out)
  (out / 'index.json').write_text('{"format": "other"}')
  with pytest.raises(ValueError, match='mhc tokens 1'):
    token_dataset.read(out)
  (out / 'index.json').unlink()
  with pytest.raises(ValueError, match=r'not empty \(.*choose another'):
    tokenize_corpus.prepare(path, out, 'bytes')
  with pytest.raises(ValueError, match=r'not empty \(\d+.txt\)'):
    tokenize_corpus.prepare(path, tmp_path / 'in', 'bytes')
  with pytest.raises(ValueError, match='train:32768'):
    tokenize_corpus.prepare(path, tmp_path / 'new', 'train:many')


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl', b'{"text": "x"}\n{"txt": 1}\n', "line 2.*'text'"),
    ('a.jsonl', b'{"text": 3}\n', 'not a string'),
    ('a.jsonl', b'{"text": \n', 'line 1: not a JSON'),
    ('a.parquet', b'PAR1', 'not a readable Parquet'),
    ('a.array_record', b'nothing', 'not a readable ArrayRecord'),
    ('a.txt', b'ab\xff', r'not UTF-8 text \(byte 2\)'),
  ],
)
def test_a_bad_record_is_named(tmp_path, name, content, message):
  file = tmp_path / name
  file.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(documents.read(name, file))


def test_a_parquet_file_without_text(tmp_path):
  file = tmp_path / 'a.parquet'
  parquet.write_table(pyarrow.table({'body': ['x']}), file)
  with pytest.raises(ValueError, match=r"no column 'text'.*body"):
    list(documents.read('a', file))


def test_bytes_a_token_follow_the_vocabulary(tmp_path):
  """What evaluate divides by: the bytes of text, marks not counted."""
  index = tokenize_corpus.prepare(
    write(tmp_path / 'in', 'text'), tmp_path / 'o', 'train:270'
  )
  corpus = corpus_lib.load(str(tmp_path / 'o'))
  total = sum(
    corpus.tokenizer.num_bytes(shard[:])
    for shard in (*corpus.train, *corpus.heldout)
  )
  assert total == index['num_bytes']
  assert isinstance(corpus.tokenizer, tokenizer.BPE)
