"""Which rows a step trains on: epochs, mixtures, blocks, processes, threads."""

import collections
import itertools
import shutil
import threading
import time

import grain
import numpy as np
import pytest

from mhc import config
from mhc.data import batches as batches_lib
from mhc.data import corpus as corpus_lib
from mhc.data import corruption
from mhc.data import mixture as mixture_lib
from mhc.data import rows as rows_lib
from mhc.data import token_dataset
from mhc.data import token_file
from mhc.data import tokenize_corpus
from mhc.runtime import retry

VOCAB = 2**15
LENGTH = 8


def corpus_of(first, count, name='text'):
  """Tokens that say where they are."""
  tokens = np.arange(first, first + count, dtype=np.uint16)
  return corpus_lib.Corpus(
    name, (tokens,), (tokens[:50],), None, 2, 1, count, name
  )


def mixture(*shares):
  """Of corpora with so many rows and such weights."""
  first, corpora = 0, []
  for number, (rows, _) in enumerate(shares):
    corpora.append(corpus_of(first, rows * LENGTH + 1, f'text{number}'))
    first += rows * LENGTH + LENGTH
  total = sum(weight for _, weight in shares)
  weights = tuple(weight / total for _, weight in shares)
  names = tuple(corpus.name for corpus in corpora)
  return mixture_lib.Mixture(tuple(corpora), weights, names)


def settings(**changes):
  return config.DataConfig(**{'seq_len': LENGTH, 'batch_size': 6, **changes})


def first_tokens(mixture_, count, slots=None, seed=3, **changes):
  """[count, slots]: each row's first token, which tells the row."""
  batches = batches_lib.train_batches(
    mixture_, settings(**changes), seed, VOCAB, slots
  )
  return np.stack([next(batches)[:, 0] for _ in range(count)])


def test_rows_are_in_the_order_that_they_always_had():
  """So that a run of before goes on with its own data."""
  mixed = mixture((50, 1))
  rows = rows_lib.Rows(mixed.corpora[0].train, LENGTH, 'text', VOCAB)
  before = grain.MapDataset.source(rows).seed(3).shuffle().repeat().batch(6)
  batches = batches_lib.train_batches(mixed, settings(), 3, VOCAB)
  for step in range(30):
    np.testing.assert_array_equal(next(batches), before[step])


def test_shares_are_those_of_the_weights():
  mixed = mixture((500, 0.55), (300, 0.3), (700, 0.15))
  order = batches_lib.Order([500, 300, 700], mixed.weights, 0)
  found = collections.Counter(order.turn(i)[0] for i in range(100_000))
  for number, weight in enumerate(mixed.weights):
    assert abs(found[number] / 1e5 / weight - 1) < 1e-4
  # And in every stretch of the run.
  few = collections.Counter(order.turn(i)[0] for i in range(7000, 8000))
  for number, weight in enumerate(mixed.weights):
    assert abs(few[number] - 1000 * weight) <= 10


@pytest.mark.parametrize(
  'weights',
  [
    (1.0, 1e-3),
    (7.0, 3.0, 2.0, 1.0),
    pytest.param((1.0, 1.5), marks=pytest.mark.slow),
  ],
)
def test_shares_of_uneven_weights(weights):
  order = batches_lib.Order([5000] * len(weights), weights, 0)
  found = collections.Counter(order.turn(i)[0] for i in range(100_000))
  for number, weight in enumerate(weights):
    want = weight / sum(weights)
    assert abs(found[number] / 1e5 - want) <= 1e-5


def test_each_corpus_of_a_mixture_has_its_epochs():
  mixed = mixture((40, 2), (30, 1))
  got = first_tokens(mixed, 30).reshape(-1)
  for corpus, size in zip(mixed.corpora, (40, 30), strict=True):
    first = int(corpus.train[0][0])
    mine = got[(got >= first) & (got < first + size * LENGTH)]
    for epoch in range(len(mine) // size):
      rows = np.sort(mine[epoch * size : (epoch + 1) * size])
      np.testing.assert_array_equal(rows, first + LENGTH * np.arange(size))
  other = first_tokens(mixed, 30, seed=4).reshape(-1)
  assert (other != got).any()


@pytest.mark.parametrize('block_rows', [1, 4])
def test_processes_read_the_same_batches(block_rows):
  """However many there are, and wherever they go on."""
  mixed = mixture((60, 2), (48, 1))
  want = first_tokens(mixed, 40, block_rows=block_rows)
  for number in (2, 3, 6):
    parts = [
      first_tokens(mixed, 40, list(range(p, 6, number)), block_rows=block_rows)
      for p in range(number)
    ]
    for process, part in enumerate(parts):
      np.testing.assert_array_equal(part, want[:, process::number])
  for stops in ((7, 8, 29), (1, 2, 3)):  # three kills
    batches, got = None, []
    for first, last in itertools.pairwise((0, *stops, 40)):
      batches = batches_lib.train_batches(
        mixed, settings(block_rows=block_rows), 3, VOCAB
      )
      batches.set_state({'next_index': first})
      got += [next(batches)[:, 0] for _ in range(first, last)]
      assert batches.get_state() == {'next_index': last}
    np.testing.assert_array_equal(got, want)


def test_blocks_are_read_through_and_make_an_epoch():
  mixed = mixture((96, 1))
  got = first_tokens(mixed, 64, block_rows=4) // LENGTH
  for slot in range(6):
    # Not all begin at a time: some in the middle of their first block.
    first = slot * 4 // 6
    for turn in range(1, 15):
      rows = got[4 * turn - first : 4 * turn - first + 4, slot]
      assert rows[0] % 4 == 0
      np.testing.assert_array_equal(rows, rows[0] + np.arange(4))
  starts = collections.Counter(
    int(got[step, slot] // 4)
    for slot in range(6)
    for step in range(64)
    if (step + slot * 4 // 6) % 4 == 0
  )
  # 24 blocks, of which each comes about equally often.
  assert len(starts) == 24
  assert max(starts.values()) - min(starts.values()) <= 2


def test_blocks_span_no_shards():
  shards = [np.arange(100), np.arange(200, 230), np.arange(300, 305)]
  rows = rows_lib.Rows(shards, LENGTH, 'text', 500, block_rows=3)
  assert rows.num_blocks == 4 + 1
  for number in range(5):
    block = rows.block(number)
    first = number * 3 if number < 4 else 12
    want = np.stack([rows[first + i] for i in range(3)])
    np.testing.assert_array_equal(block, want)
    assert block.dtype == shards[0].dtype
  with pytest.raises(ValueError, match=r'block_rows=50 rows .*reduce'):
    _ = rows_lib.Rows(shards, LENGTH, 'text', 500, block_rows=50).num_blocks


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A folder of tokens, larger than a block of CRCs."""
  folder = tmp_path_factory.mktemp('tokens')
  text = '\n'.join(
    f'{{"text": "{n:05d} {"x" * (n % 200)}"}}' for n in range(9000)
  )
  (folder / 'in.jsonl').write_text(text)
  out = folder / 'out'
  tokenize_corpus.prepare(str(folder / 'in.jsonl'), out, 'bytes', workers=1)
  assert (out / 'train-00000.bin').stat().st_size > 4 * token_file.BLOCK
  return out


@pytest.fixture
def folder(prepared, tmp_path):
  """A copy, which a test may damage."""
  return shutil.copytree(prepared, tmp_path / 'out')


def load(folder, policy='stop'):
  return mixture_lib.Mixture.of(corpus_lib.load(str(folder), policy))


@pytest.mark.parametrize(
  ('block_rows', 'policy'),
  [
    *((1, 'skip'), (16, 'stop')),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in ((1, 'stop'), (16, 'skip'))
    ),
  ],
)
def test_reading_ahead_changes_nothing(folder, block_rows, policy):
  if policy == 'skip':
    file = folder / 'train-00000.bin'
    content = bytearray(file.read_bytes())
    content[3 * token_file.BLOCK + 77] ^= 4
    file.write_bytes(content)
  got, mixed = [], None
  for ahead in (0, 1, 5):
    mixed = load(folder, policy)
    batches = batches_lib.train_batches(
      mixed,
      settings(seq_len=64, block_rows=block_rows, read_ahead=ahead),
      0,
      258,
    )
    for _ in range(7):
      next(batches)
    batches.set_state({'next_index': 2})
    got.append(np.stack([next(batches) for _ in range(200)]))
  np.testing.assert_array_equal(got[0], got[1])
  np.testing.assert_array_equal(got[0], got[2])
  assert len(mixed.skipped()) == (policy == 'skip')
  assert mixed.summary(0)['num_skipped'] == (policy == 'skip')
  # What another process has met counts once.
  met = [*mixed.skipped(), 'x.bin 3']
  assert mixed.summary(0, met)['num_skipped'] == len(met)


class Slow:
  """A file system that takes its time, and what is read of it."""

  def __init__(self, monkeypatch, seconds):
    self.reads, lock, read = [], threading.Lock(), retry.File.pread

    def slow(file, first, size):
      with lock:
        self.reads.append((first, size))
      time.sleep(seconds)
      return read(file, first, size)

    monkeypatch.setattr(retry.File, 'pread', slow)


def test_slow_reads_are_waited_for_side_by_side(folder, monkeypatch):
  """8 rows a step at 10 ms a read: 80 ms a step, but for the threads."""
  mixed = load(folder)
  Slow(monkeypatch, 0.01)
  batches = batches_lib.train_batches(
    mixed, settings(seq_len=64, batch_size=8, read_ahead=4), 0, 258
  )
  next(batches)
  time.sleep(0.4)  # a step, in which four more are read
  start = time.perf_counter()
  for _ in range(4):
    next(batches)
  assert time.perf_counter() - start < 8 * 0.01


def test_a_block_is_one_read_of_its_own_process(folder, monkeypatch):
  slow = Slow(monkeypatch, 0)
  for slots in ((0, 1, 2), (3, 4, 5)):
    batches = batches_lib.train_batches(
      load(folder),
      settings(seq_len=64, block_rows=8, read_ahead=3),
      0,
      258,
      slots,
    )
    for _ in range(32):
      next(batches)
  # For each process, 32 steps of 3 rows are 12 blocks, 3 more that were begun
  # in the middle, and those of the steps that are read ahead.
  assert 2 * 15 <= len(slow.reads) <= 2 * (15 + 3)


def test_a_row_beyond_a_damaged_block_stays(folder):
  """A block that cannot be read whole is read by its rows."""
  file = folder / 'train-00000.bin'
  mixed = load(folder)
  want = rows_lib.Rows(mixed.corpora[0].train, 64, 'text', 258, 4096)
  good = want.block(0)
  content = bytearray(file.read_bytes())
  content[2 * token_file.BLOCK + 5] ^= 1
  file.write_bytes(content)
  mixed = load(folder, 'skip')
  rows = rows_lib.Rows(mixed.corpora[0].train, 64, 'text', 258, 4096)
  got = rows.block(0)
  changed = np.flatnonzero((got != good).any(axis=1))
  block = token_file.BLOCK // 2 // 64  # rows
  assert 0 < len(changed) <= block + 2
  assert changed.min() >= 2 * block - 1


def test_held_out_text_is_shared_out_by_weight():
  mixed = mixture((500, 3), (300, 1))
  rows, of = batches_lib.heldout_rows(mixed, settings(), 4, VOCAB)
  assert of.tolist() == [0, 0, 0, 1]
  assert rows[3, 0] == mixed.corpora[1].heldout[0][0]
  rows, of = batches_lib.heldout_rows(mixed, settings(), None, VOCAB)
  assert np.bincount(of).tolist() == [6, 6]
  assert len(rows) == 12


def test_held_out_text_is_in_no_batch(tmp_path):
  """By hashes, of every document of a mixture of text and tokens."""
  rng = np.random.default_rng(0)
  for name in ('one', 'two'):
    lines = (f'{{"text": "{name} {rng.integers(10**12)}"}}' for _ in range(300))
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  tokenize_corpus.prepare(
    str(tmp_path / 'two.jsonl'), tmp_path / 'two', 'bytes', workers=1
  )
  data = settings(
    seq_len=64,
    mixture=(f'{tmp_path}/one.jsonl=3', f'{tmp_path}/two=1'),
  )
  mixed = mixture_lib.load(config.Config(data=data))
  heldout = set()
  for corpus in mixed.corpora:
    text = corpus.tokenizer.decode(corpus.heldout[0][:])
    heldout |= set(
      text.replace(b'one', b'\none').replace(b'two', b'\ntwo').split(b'\n')
    )
  heldout = {hash(text[4:]) for text in heldout if text}
  assert len(heldout) > 20
  batches = batches_lib.train_batches(mixed, data, 0, 320)
  seen = set()
  for _ in range(400):
    for row in next(batches):
      text = mixed.tokenizer.decode(row)
      for part in text.replace(b'two', b'one').split(b'one')[1:-1]:
        seen.add(hash(part[1:]))
  assert len(seen) > 200
  assert not seen & heldout


def test_a_mixture_has_one_vocabulary(tmp_path):
  (tmp_path / 'text.jsonl').write_text(
    '\n'.join(f'{{"text": "red green {n}"}}' for n in range(200))
  )
  text = str(tmp_path / 'text.jsonl')
  for size in (262, 264):
    tokenize_corpus.prepare(text, tmp_path / str(size), f'train:{size}')

  def loaded(*paths, vocab_size=300):
    entries = tuple(f'{path}=1' for path in paths)
    base = config.Config()
    return mixture_lib.load(
      config.Config(
        data=settings(mixture=entries),
        model=type(base.model)(vocab_size=vocab_size),
      )
    )

  # Text beside tokens is read by their vocabulary, in any order.
  for paths in ((text, tmp_path / '262'), (tmp_path / '262', text)):
    mixed = loaded(*paths)
    assert mixed.tokenizer.num_tokens == 262
    assert [corpus.name for corpus in mixed.corpora][paths.index(text)] == text
  with pytest.raises(ValueError, match='another vocabulary'):
    loaded(tmp_path / '262', tmp_path / '264')
  for name in ('train.bin', 'val.bin'):
    path = tmp_path / 'raw' / name
    path.parent.mkdir(exist_ok=True)
    np.arange(250, dtype=np.uint16).tofile(path)
  with pytest.raises(ValueError, match=r'vocabulary of .*raw is unknown'):
    loaded(text, tmp_path / 'raw')
  with pytest.raises(ValueError, match=r'vocab_size=261'):
    loaded(text, tmp_path / '262', vocab_size=261)


def test_a_summary_has_the_epochs_of_each_corpus():
  mixed = mixture((40, 3), (30, 1))
  found = mixed.summary(2000)
  assert found['train_tokens'] == 40 * LENGTH + 30 * LENGTH + 2
  assert [one['weight'] for one in found['sources']] == [0.75, 0.25]
  assert found['sources'][1]['epochs'] == 500 / (30 * LENGTH + 1)
  assert found['name'] == 'text0, text1'
  assert mixed.sha256 != mixture((40, 1), (30, 1)).sha256


def test_bad_mixtures_are_refused():
  for entry in ('data/web', 'data/web=', 'data/web=0', 'data/web=-1', 'a=nan'):
    with pytest.raises(ValueError, match=r'must be PATH=WEIGHT'):
      settings(mixture=(entry,))
  with pytest.raises(ValueError, match=r'a path of its own'):
    settings(mixture=('a=1', 'a=2'))
  with pytest.raises(ValueError, match=r'exclude each other'):
    settings(mixture=('a=1',), path='b')
  assert settings(mixture=('a=b=1', '=2')).sources() == (('a=b', 1), ('', 2))


def test_a_run_says_what_it_found(tmp_path):
  (tmp_path / 'README.md').write_text('of the texts')
  lines = '\n'.join(f'{{"text": "number {n}"}}' for n in range(100))
  (tmp_path / 'a.jsonl').write_text(lines)
  (line,) = mixture_lib.Mixture.of(corpus_lib.load(str(tmp_path))).lines()
  for part in (
    '100 documents of 890 bytes',
    'held out',
    'tokens of bytes (258) to train on',
    '1 left out as no documents: README.md',
  ):
    assert part in line
  with pytest.raises(ValueError, match=r'is a stream.*prepare_data\.py'):
    corpus_lib.load('hf://some/text:train')


def test_a_log_counts_blocks_by_name():
  log = corruption.SkipLog('skip')
  log.report('bad', block='a 1')
  log.report('bad', block='a 1')
  assert log.blocks == {'a 1'}
  assert token_dataset.SIDES == ('train', 'heldout')
