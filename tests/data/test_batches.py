"""Documents, their split, rows, order and resumption."""

import hashlib
import pathlib

import numpy as np
import pytest

from mhc import config
from mhc.data import batches as batches_lib
from mhc.data import corpus as corpus_lib
from mhc.data import mixture as mixture_lib
from mhc.data import rows as rows_lib
from mhc.data import tokenizer

BYTES = tokenizer.Bytes()
SMALL = config.DataConfig(seq_len=10, batch_size=4)


def text_of(shards):
  return b''.join(map(BYTES.decode, shards)).decode()


@pytest.fixture
def folder(tmp_path):
  """Forty files with ten bytes of their own number each."""
  for number in range(40):
    file = tmp_path / 'texts' / f'part{number % 3}' / f'{number}.txt'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{number:02d}' * 5)
  (tmp_path / 'texts' / '.hidden').write_bytes(b'\xff\xfe')
  return tmp_path / 'texts'


def test_held_out_files_are_whole_and_chosen_by_name(folder):
  corpus = corpus_lib.load(str(folder))
  assert corpus.num_documents == 40
  assert corpus.num_bytes == 400
  chosen = {
    f'{n:02d}'
    for n in range(40)
    if int(hashlib.sha1(f'part{n % 3}/{n}.txt'.encode()).hexdigest(), 16) % 20
    == 0
  }
  text = text_of(corpus.heldout)
  assert {text[i : i + 2] for i in range(0, len(text), 10)} == chosen
  assert corpus.num_train_tokens + len(corpus.heldout[0]) == 40 * 12
  train = text_of(corpus.train)
  assert not chosen & {train[i : i + 2] for i in range(0, len(train), 10)}


def test_a_single_file_holds_out_its_end(tmp_path):
  file = tmp_path / 'book.txt'
  file.write_text('a' * 950 + 'b' * 50)
  corpus = corpus_lib.load(str(file))
  assert text_of(corpus.train) == 'a' * 950
  assert text_of(corpus.heldout) == 'b' * 50


def test_copies_and_empty_files_are_dropped(tmp_path):
  for name, text in (('a', 'one'), ('b', 'one'), ('c', ' \n'), ('d', 'two')):
    (tmp_path / name).write_text(text)
  assert corpus_lib.load(str(tmp_path)).num_documents == 2


def test_a_pattern_selects_files(folder):
  corpus = corpus_lib.load(str(folder / 'part1' / '*.txt'))
  assert corpus.num_documents == 13


def test_standard_library_is_the_default():
  corpus = corpus_lib.load('')
  assert corpus.num_documents > 300
  assert corpus.num_bytes > 5e6
  assert 0.01 < len(corpus.heldout[0]) / corpus.num_train_tokens < 0.12
  again = corpus.summary()
  assert corpus_lib.load('').summary() == again


def test_tokens_round_trip():
  texts = ['naïve — 日本', 'x']
  tokens = BYTES.encode_documents([t.encode() for t in texts])
  assert tokens.dtype == np.uint16
  assert BYTES.decode(tokens).decode() == ''.join(texts)
  assert list(tokens[-3:]) == [BYTES.start, ord('x'), BYTES.stop]
  assert tokens.max() < BYTES.num_tokens


def mixture_of(tokens):
  tokens = np.asarray(tokens, np.uint16)
  return mixture_lib.Mixture.of(
    corpus_lib.Corpus(
      'test', (tokens,), (tokens[:50],), BYTES, 2, 1, len(tokens), ''
    )
  )


def test_rows_overlap_by_one_and_cover_the_text():
  rows = rows_lib.Rows([np.arange(101, dtype=np.uint16)], 10, 'text', 258)
  assert len(rows) == 10
  stacked = np.stack([rows[i] for i in range(10)])
  np.testing.assert_array_equal(stacked[:, :-1].reshape(-1), np.arange(100))
  np.testing.assert_array_equal(stacked[:, 1:].reshape(-1), np.arange(1, 101))
  assert stacked.dtype == np.int32


def test_an_epoch_is_a_permutation_and_epochs_differ():
  settings = config.DataConfig(seq_len=10, batch_size=5)
  batches = batches_lib.train_batches(
    mixture_of(np.arange(201)), settings, 3, 258
  )
  epochs = [
    np.concatenate([next(batches)[:, 0] for _ in range(4)]) for _ in range(2)
  ]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(0, 200, 10))
  assert (epochs[0] != epochs[1]).any()
  other = batches_lib.train_batches(
    mixture_of(np.arange(201)), settings, 4, 258
  )
  assert (next(other)[:, 0] != epochs[0][:5]).any()


def test_an_iterator_resumes_where_its_state_says():
  settings = config.DataConfig(seq_len=10, batch_size=3)
  mixture = mixture_of(np.arange(201))
  first = batches_lib.train_batches(mixture, settings, 0, 258)
  for _ in range(9):
    next(first)
  state = first.get_state()
  want = [next(first) for _ in range(5)]
  second = batches_lib.train_batches(mixture, settings, 0, 258)
  second.set_state(state)
  np.testing.assert_array_equal([next(second) for _ in range(5)], want)


def test_held_out_rows_are_spread_over_the_text():
  mixture = mixture_lib.Mixture.of(
    corpus_lib.Corpus(
      '', (np.arange(9),), (np.arange(1001),), None, 2, 1, 0, ''
    )
  )
  rows = batches_lib.heldout_rows(mixture, SMALL, 4, 1001)[0]
  np.testing.assert_array_equal(rows[:, 0], [0, 250, 500, 750])
  assert len(batches_lib.heldout_rows(mixture, SMALL, 5000, 1001)[0]) == 100
  assert len(batches_lib.heldout_rows(mixture, SMALL, None, 1001)[0]) == 100


def test_unusable_text_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    corpus_lib.load(str(tmp_path / 'nowhere'))
  with pytest.raises(FileNotFoundError, match='names no file'):
    corpus_lib.load(str(tmp_path))
  (tmp_path / 'empty.txt').write_text('')
  with pytest.raises(ValueError, match='every file is empty'):
    corpus_lib.load(str(tmp_path / 'empty.txt'))
  (tmp_path / 'latin.txt').write_bytes('caf\xe9'.encode('latin-1'))
  with pytest.raises(ValueError, match=r'latin\.txt is not UTF-8.*byte 3'):
    corpus_lib.load(str(tmp_path / 'latin.txt'))
  with pytest.raises(ValueError, match=r'seq_len=64.*50 tokens.*held-out'):
    batches_lib.heldout_rows(
      mixture_of(np.arange(80)), config.DataConfig(seq_len=64), 1, 258
    )


def test_the_default_corpus_is_not_in_the_repository():
  root = pathlib.Path(batches_lib.__file__).parents[2]
  assert not list(root.glob('mhc/*.txt'))
