"""Damaged data end a run in one line, or are left out; never believed."""

import errno
import itertools
import json
import os

from array_record.python import array_record_module
import numpy as np
import pyarrow
from pyarrow import parquet
import pytest
from slow import fuzz_data

from mhc import config
from mhc.data import batches as batches_lib
from mhc.data import corpus as corpus_lib
from mhc.data import corruption
from mhc.data import documents
from mhc.data import mixture as mixture_lib
from mhc.data import rows as rows_lib
from mhc.data import token_dataset
from mhc.data import token_file
from mhc.data import tokenize_corpus
from mhc.data import tokenizer
from mhc.runtime import retry

TEXTS = [f'document {number} says {number * 37 % 11}\n' for number in range(90)]
# One thread reads, so that faults come at a place that is known.
SMALL = config.DataConfig(seq_len=16, batch_size=4, read_ahead=0)


def flip(file, place, bit=1):
  content = bytearray(file.read_bytes())
  content[place] ^= bit
  file.write_bytes(content)


def lines_with(*bad):
  """JSON lines of the texts, of which some are damaged."""
  lines = [json.dumps({'text': text}) for text in TEXTS]
  for number in bad:
    lines[number] = lines[number][:-3]
  return '\n'.join(lines)


def decoded(shard):
  return tokenizer.Bytes().decode(shard[:]).decode()


@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_bad_line_is_named_or_left_out(tmp_path, policy, capsys):
  good, bad = tmp_path / 'good', tmp_path / 'bad'
  for folder, lines in ((good, lines_with()), (bad, lines_with(3, 4, 50, 70))):
    folder.mkdir()
    (folder / 'a.jsonl').write_text(lines)
  if policy == 'stop':
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: .*'skip'"):
      corpus_lib.load(str(bad))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: .*'skip'"):
      tokenize_corpus.prepare(str(bad), tmp_path / 'out', 'bytes')
    return
  want, got = corpus_lib.load(str(good)), corpus_lib.load(str(bad), 'skip')
  said = capsys.readouterr().err
  assert 'DAMAGED DATA: 4 left out: ' in said
  assert 'line 4: ' in said
  assert 'line 71' not in said
  assert 'and 1 more' in said
  assert got.summary()['num_skipped'] == got.num_skipped == 4
  assert want.summary()['num_skipped'] == 0
  # The others are on the side where they were.
  lost = {TEXTS[number] for number in (3, 4, 50, 70)}
  for side in token_dataset.SIDES:
    before = set(decoded(getattr(want, side)[0]).splitlines(True))
    after = set(decoded(getattr(got, side)[0]).splitlines(True))
    assert after == before - lost
  again = corpus_lib.load(str(bad), 'skip')
  assert again.sha256 == got.sha256
  index = tokenize_corpus.prepare(str(bad), tmp_path / 'out', 'bytes', 'skip')
  assert index['num_skipped'] == 4
  assert corpus_lib.load(str(tmp_path / 'out')).num_skipped == 4


def test_what_remains_of_a_parquet_file_is_kept(tmp_path):
  file = tmp_path / 'a.parquet'
  table = pyarrow.table({'text': TEXTS})
  parquet.write_table(
    table,
    file,
    row_group_size=30,
    compression='none',
    use_dictionary=False,
    write_page_checksum=True,
  )
  flip(file, file.read_bytes().index(b'document 40'))
  with pytest.raises(ValueError, match='rows 31 to 60, cannot be read'):
    list(documents.read('a', file))
  log = corruption.SkipLog('skip')
  got = [document for document, _ in documents.read('a', file, log)]
  names = [f'a:{number}' for number in (*range(1, 31), *range(61, 91))]
  assert [document.name for document in got] == names
  assert log.names == [f'a:{number}' for number in range(31, 61)]
  assert log.count == 1
  file.write_bytes(file.read_bytes()[:-10])
  assert list(documents.read('a', file, log)) == []
  assert log.count == 2


def test_what_remains_of_an_array_record_file_is_kept(tmp_path):
  file = tmp_path / 'a.array_record'
  out = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
  for number in range(50):
    out.write(b'\xff' if number == 9 else f'record {number} '.encode() * 20)
  out.close()
  flip(file, 100)
  log = corruption.SkipLog('skip')
  got = [document.name for document, _ in documents.read('a', file, log)]
  assert got == [f'a:{number}' for number in range(2, 51) if number != 10]
  assert log.names == ['a:1', 'a:10']


def test_a_link_to_nowhere_is_a_damaged_file(tmp_path):
  (tmp_path / 'a.txt').write_text('good ' * 100)
  (tmp_path / 'b.txt').symlink_to(tmp_path / 'gone')
  with pytest.raises(ValueError, match=r'b\.txt cannot be read: No such file'):
    corpus_lib.load(str(tmp_path))


def test_nothing_left_is_an_error(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\xff')
  (tmp_path / 'b.jsonl').write_text('{"text": \n7\n')
  for path in (tmp_path, tmp_path / 'b.jsonl'):
    with pytest.raises(ValueError, match='holds no text: DAMAGED DATA'):
      corpus_lib.load(str(path), 'skip')
    with pytest.raises(ValueError, match='holds no text: DAMAGED DATA'):
      tokenize_corpus.prepare(str(path), tmp_path / 'out', 'bytes', 'skip')


def test_the_split_does_not_depend_on_what_was_skipped():
  all_of_them = [documents.Document(f'd{n}', b'x%d' % n) for n in range(12)]
  assert not any(map(documents.is_held_out, all_of_them))
  train, heldout = documents.split(all_of_them)
  for lost in train:
    rest = [d for d in all_of_them if d != lost]
    assert documents.split(rest, [lost.name])[1] == heldout
  with pytest.raises(ValueError, match=f'evaluation.*{heldout[0].name}:'):
    documents.split(train, [heldout[0].name])


@pytest.fixture
def folder(tmp_path, monkeypatch, small_parts):
  """A folder of tokens in several shards of several blocks."""
  monkeypatch.setattr(token_file, 'BLOCK', 256)
  small_parts(part=1000, bucket=1300)
  (tmp_path / 'in.jsonl').write_text(lines_with())
  tokenize_corpus.prepare(
    str(tmp_path / 'in.jsonl'), tmp_path / 'out', 'bytes', workers=1
  )
  return tmp_path / 'out'


def batches_of(folder, policy='stop', first=0, count=60):
  corpus = corpus_lib.load(str(folder), policy)
  batches = batches_lib.train_batches(
    mixture_lib.Mixture.of(corpus), SMALL, 0, 258
  )
  batches.set_state({'next_index': first})
  return corpus, np.stack([next(batches) for _ in range(count)])


@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_batches_are_a_function_of_seed_and_step(folder, policy):
  """Over shards and epochs, also with damage, also from the middle."""
  if policy == 'skip':
    flip(folder / 'train-00001.bin', 300)
  corpus, want = batches_of(folder, policy)
  assert len(corpus.train) == 3
  per_epoch = len(rows_lib.Rows(corpus.train, 16, 'text', 258)) // 4
  assert 10 < per_epoch < 50
  assert (want[:per_epoch] != want[per_epoch : 2 * per_epoch]).any()
  for first in (1, per_epoch // 2, per_epoch, per_epoch + 7):
    _, got = batches_of(folder, policy, first, 60 - first)
    np.testing.assert_array_equal(got, want[first:])
  assert corpus.num_skipped == (policy == 'skip')


def test_a_flipped_bit_in_a_token_file_is_noticed(folder, capsys):
  corpus, before = batches_of(folder)
  file = folder / 'train-00001.bin'
  flip(file, 300)
  with pytest.raises(ValueError, match=r'train-00001\.bin, block 1 .*skip'):
    batches_of(folder)
  corpus, after = batches_of(folder, 'skip')
  assert 'train-00001.bin, block 1 ' in capsys.readouterr().err
  assert corpus.num_skipped == 1
  # Rows that touch the block are others, all of them good; the rest is as it
  # was.
  damaged = rows_lib.Rows([corpus.train[1]], 16, 'text', 258)
  bad = {row for row in range(len(damaged)) if row * 16 + 16 >= 128}
  bad &= {row for row in range(len(damaged)) if row * 16 < 256}
  first = sum((len(shard) - 1) // 16 for shard in corpus.train[:1])
  flip(file, 300)
  rows = rows_lib.Rows(token_dataset.read(folder).train, 16, 'text', 258)
  good = {rows[n].tobytes() for n in range(len(rows)) if n - first not in bad}
  lost = {rows[first + n].tobytes() for n in bad}
  changed = 0
  for old, new in zip(
    before.reshape(-1, 17), after.reshape(-1, 17), strict=True
  ):
    assert new.tobytes() in good
    assert old.tobytes() in lost or (old == new).all()
    changed += (old != new).any()
  assert changed > len(bad) // 2


def test_a_lost_end_and_lost_digests(folder):
  file = folder / 'train-00002.bin'
  whole = file.read_bytes()
  file.write_bytes(whole[:-300])
  with pytest.raises(ValueError, match=r'train-00002\.bin has .* instead of'):
    batches_of(folder)
  corpus, _ = batches_of(folder, 'skip')
  assert decoded(corpus.train[2][:120]) == decoded(
    np.frombuffer(whole[:240], '<u2')
  )
  file.write_bytes(whole)
  (folder / 'train-00000.crc').unlink()
  with pytest.raises(ValueError, match=r'train-00000\.crc is unreadable'):
    batches_of(folder)
  flip(folder / 'train-00001.crc', 0)
  corpus, _ = batches_of(folder, 'skip')
  corpus.train[1][128:256]  # what agrees with the rest of them
  with pytest.raises(corruption.Skipped):
    corpus.train[1][:128]
  with pytest.raises(corruption.Skipped):
    corpus.train[0][:128]


def test_all_of_it_damaged_is_an_error(folder):
  for file in folder.glob('train-*.bin'):
    file.write_bytes(bytes(file.stat().st_size))
  with pytest.raises(ValueError, match=r'train.* damaged.*prepare'):
    batches_of(folder, 'skip')


def test_older_folders_stay_readable(folder):
  _, want = batches_of(folder)
  index = json.loads((folder / 'index.json').read_text())
  assert len(index['digests']['train']) == len(index['train'])
  del index['digests'], index['num_skipped']
  (folder / 'index.json').write_text(json.dumps(index))
  for file in folder.glob('*.crc'):
    file.unlink()
  corpus, got = batches_of(folder)
  np.testing.assert_array_equal(got, want)
  assert corpus.num_skipped == 0


def test_another_vocabulary_under_that_name_is_noticed(folder, tmp_path):
  out = tmp_path / 'bpe'
  tokenize_corpus.prepare(
    str(tmp_path / 'in.jsonl'), out, 'train:270', workers=1
  )
  flip(out / 'tokenizer.json', -3)
  with pytest.raises(ValueError, match=r'tokenizer\.json does not match'):
    token_dataset.read(out)


@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_token_of_no_vocabulary_is_an_error_wherever_it_is(tmp_path, policy):
  """Beyond what `check_vocabulary` looks at; nothing is clamped."""
  values = np.arange(2000, dtype=np.uint16) % 300
  values.tofile(tmp_path / 'val.bin')
  values[1900] = 301
  values.tofile(tmp_path / 'train.bin')
  mixture = mixture_lib.Mixture.of(corpus_lib.load(str(tmp_path), policy))
  batches = batches_lib.train_batches(mixture, SMALL, 0, 301)
  with pytest.raises(ValueError, match=r'train\.bin: token 301.*vocab_size'):
    list(itertools.islice(batches, 40))
  batches = batches_lib.train_batches(mixture, SMALL, 0, 302)
  assert max(next(batches).max() for _ in range(40)) == 301
  with pytest.raises(ValueError, match=r'val\.bin: token 299'):
    batches_lib.heldout_rows(mixture, SMALL, None, 299)


class Flaky:
  """An os function that fails some times at first."""

  def __init__(self, function, *errors):
    self._function, self._errors = function, list(errors)

  def __call__(self, *arguments):
    if self._errors:
      number = self._errors.pop(0)
      raise OSError(number, os.strerror(number))
    return self._function(*arguments)


@pytest.fixture
def slept(monkeypatch):
  waits = []
  monkeypatch.setattr(retry, 'sleep', waits.append)
  return waits


def test_hiccups_of_a_file_system_are_outlasted(
  folder, tmp_path, monkeypatch, slept, capsys
):
  _, want = batches_of(folder)
  errors = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]
  monkeypatch.setattr(retry.os, 'pread', Flaky(os.pread, *errors))
  _, got = batches_of(folder)
  np.testing.assert_array_equal(got, want)
  assert slept == [0.5, 1, 2]
  said = capsys.readouterr().err
  assert said.count('trying again in') == 3
  assert 'train-0000' in said
  # Lines, which come by a stream, and Parquet's, which seeks in it.
  parquet.write_table(pyarrow.table({'text': TEXTS}), tmp_path / 'a.parquet')
  for name in ('in.jsonl', 'a.parquet'):
    monkeypatch.setattr(retry.os, 'pread', Flaky(os.pread, errno.ESTALE))
    texts = [d.text.decode() for d, _ in documents.read('a', tmp_path / name)]
    assert texts == TEXTS


def test_what_does_not_pass_ends_within_a_minute(tmp_path, slept):
  def fail(number):
    def read():
      raise OSError(number, os.strerror(number))

    return read

  for number in (errno.ENOENT, errno.EACCES, errno.ENOSPC):
    with pytest.raises(OSError, match='here'):
      retry.with_retries(fail(number), 'here')
  assert slept == []
  with pytest.raises(OSError, match=r"error: 'here'"):
    retry.with_retries(fail(errno.EIO), 'here')
  assert slept == list(retry.BACKOFF_SECONDS)
  assert 45 < sum(slept) < 90


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EIO])
def test_a_file_system_that_is_gone_is_not_damage(
  folder, monkeypatch, slept, number
):
  """Unlike a bad sector."""
  errors = [number] * (1 + len(retry.BACKOFF_SECONDS))
  monkeypatch.setattr(retry.os, 'pread', Flaky(os.pread, *errors))
  if number == errno.ESTALE:
    with pytest.raises(OSError, match=r'Stale .*\.bin'):
      batches_of(folder, 'skip')
  else:
    corpus, _ = batches_of(folder, 'skip')
    assert corpus.num_skipped == 1


def test_a_file_is_read_at_any_place(tmp_path):
  file = tmp_path / 'file'
  file.write_bytes(bytes(range(200)))
  with retry.File(file) as opened:
    assert opened.pread(198, 5) == bytes([198, 199])
    assert opened.seek(-3, os.SEEK_END) == 197
    assert opened.read() == bytes([197, 198, 199])
    assert opened.seek(-190, os.SEEK_CUR) == opened.tell() == 10
    with pytest.raises(ValueError, match='no byte'):
      opened.seek(-1)


def test_malformed_files_of_every_kind(tmp_path):
  """A part of `python tests/slow/fuzz_data.py`."""
  good = tmp_path / 'good'
  fuzz_data.make_good(good)
  outcomes = []
  for number in range(44):
    for what, outcome, message in fuzz_data.check(number, 0, good, tmp_path):
      assert outcome in ('clean', 'refused'), f'{what}: {message}'
      outcomes.append(outcome)
  assert min(map(outcomes.count, ('clean', 'refused'))) > 20


def test_a_run_says_it_in_one_line(launch, tmp_path):
  file = tmp_path / 'in.jsonl'
  file.write_text(lines_with(3))
  arguments = f'--path={file}', f'--out={tmp_path / "out"}'
  result = launch('prepare_data.py', *arguments)
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1].startswith(f'error: {file}, line 4: ')
  result = launch('prepare_data.py', *arguments, '--on_damage=skip')
  assert result.returncode == 0, result.stderr
  assert 'DAMAGED DATA: 1 left out' in result.stderr
  assert '1 DAMAGED left out' in result.stdout
