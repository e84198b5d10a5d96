"""Tries malformed data of every format: good batches, or an error of one line.

    python tests/slow/fuzz_data.py --files 500 --seed 0

Makes --files corrupted copies of good data (text, JSON lines, Parquet,
ArrayRecord, token folders with and without digests, nanoGPT's and llm.c's
files, a vocabulary) and loads each as a run does, and as the tokenisation does,
with data.on_damage 'stop' and 'skip'. Whatever ends neither in batches of
tokens of the vocabulary nor in a ValueError or OSError of one line that names
the place is a failure, as are a hang and a crash. Tokens with digests must give
exactly the rows that were written. Some cases also run through launch/train.py.
Prints the counts, exit status 1 for failures; tests/data/test_corruption.py
does less.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import select
import shutil
import subprocess
import sys
import tempfile

from array_record.python import array_record_module
import numpy as np
import pyarrow
from pyarrow import parquet

from mhc import config
from mhc.data import batches as batches_lib
from mhc.data import corpus as corpus_lib
from mhc.data import mixture as mixture_lib
from mhc.data import token_dataset
from mhc.data import tokenize_corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]
POLICIES = ('stop', 'skip')
VOCAB = 320
SETTINGS = config.DataConfig(seq_len=32, batch_size=8)
SECONDS = 60
HINTS = 'prepare|repair|set |copy |convert |give |name the |reduce |choose '
# Kinds that hold documents, so that they can be prepared.
DOCUMENTS = ('text', 'jsonl', 'parquet', 'packed', 'array_record')
TOKENS = ('bytes', 'bpe', 'old', 'nanogpt', 'llmc')
KINDS = (*DOCUMENTS, *TOKENS, 'tokenizer')
NONSENSE = (
  'null -1 0 3.5 1e999 NaN true [] {} "" "x" "\\ud800" "a\\nb" [1,[2]] '
  f'{10**40} {2**63} {"9" * 5000} {"[" * 30000}'
).split()


def make_good(folder: pathlib.Path):
  """Writes one folder of good data per kind."""
  rng = np.random.default_rng(0)
  words = np.array(['ab ', 'cde ', 'f\n', 'ü', '<|stop|>', '日本 '])
  texts = [
    f'{number} ' + ''.join(rng.choice(words, rng.integers(200, 600)))
    for number in range(240)
  ]
  for kind in KINDS:
    (folder / kind).mkdir(parents=True)
  for number, text in enumerate(texts[:40]):
    file = folder / 'text' / f'part{number % 3}' / f'{number}.txt'
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
  for part in range(2):
    half = texts[part::2]
    lines = ''.join(json.dumps({'id': 1, 'text': text}) + '\n' for text in half)
    (folder / 'jsonl' / f'{part}.jsonl').write_text(lines)
    table = pyarrow.table({'text': half, 'id': list(range(len(half)))})
    for kind, compression in (('parquet', 'none'), ('packed', 'zstd')):
      parquet.write_table(
        table,
        folder / kind / f'{part}.parquet',
        row_group_size=30,
        compression=compression,
        write_page_checksum=kind == 'packed',
      )
    out = array_record_module.ArrayRecordWriter(
      str(folder / 'array_record' / f'{part}.array_record'), 'group_size:4'
    )
    for text in half:
      out.write(text.encode())
    out.close()
  before = tokenize_corpus.PART_BYTES, tokenize_corpus.BUCKET_BYTES
  tokenize_corpus.PART_BYTES = 100_000, 100_000
  tokenize_corpus.BUCKET_BYTES = 100_000  # shards of two blocks
  for kind, vocabulary in (('bytes', 'bytes'), ('bpe', 'train:300')):
    tokenize_corpus.prepare(
      str(folder / 'jsonl'), folder / kind, vocabulary, workers=1
    )
  tokenize_corpus.PART_BYTES, tokenize_corpus.BUCKET_BYTES = before
  shutil.copytree(folder / 'bytes', folder / 'old', dirs_exist_ok=True)
  file = folder / 'old' / 'index.json'
  index = json.loads(file.read_text())
  del index['digests'], index['num_skipped']
  file.write_text(json.dumps(index))
  for crc in file.parent.glob('*.crc'):
    crc.unlink()
  for name, count in (('train', 100_000), ('val', 5_000)):
    stream = rng.integers(0, VOCAB, count).astype('<u2')
    stream.tofile(folder / 'nanogpt' / f'{name}.bin')
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, count
    file = folder / 'llmc' / f'{name}_0.bin'
    file.write_bytes(header.tobytes() + stream.tobytes())
  shutil.copytree(folder / 'jsonl', folder / 'tokenizer', dirs_exist_ok=True)
  shutil.copy(folder / 'bpe' / 'tokenizer.json', folder / 'tokenizer')


def _files(folder):
  return sorted(file for file in folder.rglob('*') if file.is_file())


def _edit(change):
  """Turns a change of a bytearray into damage to one file."""

  def damage(rng, file, good):
    content = bytearray(file.read_bytes())
    file.write_bytes(bytes(change(rng, content)))

  damage.__name__ = change.__name__
  return damage


@_edit
def truncate(rng, content):
  return content[: rng.integers(len(content) + 1)]


@_edit
def cut_a_little(rng, content):
  return content[: -int(rng.integers(1, 9))]


@_edit
def empty(rng, content):
  return b''


@_edit
def flip(rng, content):
  for _ in range(int(rng.choice([1, 1, 3, 30]))):
    if content:
      content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
  return content


@_edit
def flip_in_the_head(rng, content):
  if content:
    content[rng.integers(min(len(content), 64))] ^= 1 << int(rng.integers(8))
  return content


@_edit
def overwrite(rng, content):
  place = int(rng.integers(len(content) + 1))
  size = int(rng.integers(1, 5000))
  content[place : place + size] = rng.bytes(min(size, len(content) - place))
  return content


@_edit
def zero(rng, content):
  place = int(rng.integers(len(content) + 1))
  size = min(int(rng.integers(1, 5000)), len(content) - place)
  content[place : place + size] = bytes(size)
  return content


@_edit
def insert(rng, content):
  place = int(rng.integers(len(content) + 1))
  content[place:place] = rng.bytes(int(rng.integers(1, 200)))
  return content


@_edit
def delete(rng, content):
  place = int(rng.integers(len(content) + 1))
  del content[place : place + int(rng.integers(1, 200))]
  return content


@_edit
def append(rng, content):
  return content + rng.bytes(int(rng.integers(1, 5000)))


@_edit
def double(rng, content):
  return content + content


@_edit
def other_encoding(rng, content):
  return bytes(content).decode(errors='replace').encode('utf-16')


@_edit
def nonsense_value(rng, content):
  """Replaces some JSON value, which may be in the middle of a file."""
  values = list(re.finditer(rb': ("[^"]*"|[\d.]+|\[[^\]]*\])', content))
  value = NONSENSE[rng.integers(len(NONSENSE))].encode()
  if not values:
    return value
  first, last = values[rng.integers(len(values))].span(1)
  return content[:first] + value + content[last:]


@_edit
def missing_key(rng, content):
  keys = list(re.finditer(rb'"(\w+)":', content))
  if not keys:
    return content[1:]
  first, last = keys[rng.integers(len(keys))].span(1)
  return content[:first] + b'other' + content[last:]


@_edit
def whole_value(rng, content):
  return NONSENSE[rng.integers(len(NONSENSE))].encode()


@_edit
def huge_numbers(rng, content):
  if len(content) >= 12:
    number = int(rng.choice([-1, 2**31 - 1, 2**30, -(2**31)]))
    content[8:12] = number.to_bytes(4, 'little', signed=True)
  return content


@_edit
def wrong_dtype(rng, content):
  dtype = rng.choice(['<u4', '<f8', '>u2', '<u1'])
  return np.frombuffer(content[: len(content) // 2 * 2], '<u2').astype(dtype)


def a_folder(rng, file, good):
  file.unlink()
  (file / 'nested').mkdir(parents=True)


def a_link(rng, file, good):
  file.unlink()
  file.symlink_to(rng.choice(['/nowhere', file.name, '.']))


def removed(rng, file, good):
  file.unlink()


def foreign(rng, file, good):
  """Puts a file of another kind under this name."""
  others = [other for kind in KINDS for other in _files(good / kind)]
  shutil.copy(others[rng.integers(len(others))], file)


def swapped(rng, file, good):
  """Swaps two files of the folder."""
  others = _files(file.parent)
  other = others[rng.integers(len(others))]
  mine, theirs = file.read_bytes(), other.read_bytes()
  file.write_bytes(theirs)
  other.write_bytes(mine)


def odd_name(rng, file, good):
  name = os.fsencode(file.parent) + b'/\xff\xfe\n ' + os.fsencode(file.name)
  shutil.copy(file, name)
  flip(rng, file, good)


def other_columns(rng, file, good):
  """Writes a Parquet file of other columns or types."""
  values = [
    {'text': list(range(50))},
    {'body': ['x'] * 50},
    {'text': ['x', None] * 25},
    {'text': [b'\xff', b'y'] * 25},
    {'text': [['x']] * 50},
    {'text': pyarrow.array(['x', 'y'] * 25).dictionary_encode()},
    {'text': pyarrow.array([f'{i} ' * 40 for i in range(50)], 'large_string')},
    {'text': pyarrow.array([], 'string')},
    {},
  ]
  table = pyarrow.table(values[rng.integers(len(values))])
  parquet.write_table(table, file)


def other_records(rng, file, good):
  out = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
  for number in range(40):
    out.write(rng.bytes(50) if rng.random() < 0.3 else b'%d good ' % number * 9)
  out.close()


BYTES = (
  truncate,
  cut_a_little,
  empty,
  flip,
  flip,
  flip_in_the_head,
  overwrite,
  zero,
  insert,
  delete,
  append,
  double,
  a_folder,
  a_link,
  removed,
  foreign,
  swapped,
  odd_name,
)
JSON = (nonsense_value, missing_key, whole_value, other_encoding)
ONLY = {
  '.txt': (other_encoding,),
  '.jsonl': JSON,
  '.json': JSON * 3,
  '.parquet': (other_columns,) * 3,
  '.array_record': (other_records,) * 2,
  '.bin': (huge_numbers, wrong_dtype) * 2,
}


def damaged(number: int, seed: int, good: pathlib.Path, folder: pathlib.Path):
  """Writes case `number`, a corrupted copy, to `folder`; returns kind, name."""
  rng = np.random.default_rng([seed, number])
  kind = KINDS[number % len(KINDS)]
  shutil.copytree(good / kind, folder)
  # Each suffix as often as another, however many files it has.
  files = _files(folder)
  if kind == 'tokenizer':
    files = [folder / 'tokenizer.json']
  suffixes = sorted({file.suffix for file in files})
  suffix = suffixes[rng.integers(len(suffixes))]
  files = [file for file in files if file.suffix == suffix]
  file = files[rng.integers(len(files))]
  ways = (*BYTES, *ONLY.get(suffix, ()))
  way = ways[rng.integers(len(ways))]
  way(rng, file, good)
  return kind, f'{kind}: {way.__name__} {file.relative_to(folder)}'


def _few_batches(path, policy):
  """Reads a run's first batches, and checks what the model relies on."""
  corpus = corpus_lib.load(path, policy)
  corpus_lib.check_vocabulary(corpus, VOCAB)
  mixture = mixture_lib.Mixture.of(corpus)
  arguments = mixture, SETTINGS, 3, VOCAB
  batches = batches_lib.train_batches(*arguments)
  heldout, _ = batches_lib.heldout_rows(mixture, SETTINGS, 16, VOCAB)
  got = [next(batches) for _ in range(6)]
  for rows in (*got, heldout):
    assert rows.dtype == np.int32
    assert rows.shape[1:] == (SETTINGS.seq_len + 1,)
    assert rows.min() >= 0
    assert rows.max() < VOCAB
  assert got[0].shape[0] == SETTINGS.batch_size
  again = batches_lib.train_batches(*arguments)
  again.set_state({'next_index': 4})
  np.testing.assert_array_equal([next(again), next(again)], got[4:])
  json.dumps(corpus.summary())
  assert policy == 'skip' or not corpus.log.count
  if corpus.tokenizer is not None:
    assert corpus.tokenizer.num_bytes(heldout[:, 1:]) >= 0
  return got


def _prepared(path, policy, out, tokenizer='bytes'):
  tokenize_corpus.prepare(path, out, tokenizer, policy)
  return _few_batches(str(out), 'stop')


@functools.cache
def _written(folder):
  """All rows of a good folder of tokens."""
  rows = set()
  for shard in token_dataset.read(folder).train:
    values = shard[:].astype(np.int32)
    for start in range(0, len(values) - SETTINGS.seq_len, SETTINGS.seq_len):
      rows.add(values[start : start + SETTINGS.seq_len + 1].tobytes())
  return rows


def check(number: int, seed: int, good: pathlib.Path, scratch: pathlib.Path):
  """Yields (what, outcome, message) of every way to load case `number`.

  The outcome is 'clean', 'refused' or 'failed'.
  """
  folder = scratch / f'case{number}'
  kind, what = damaged(number, seed, good, folder)
  ways = {}
  for policy in POLICIES:
    out = scratch / f'out{number}-{policy}'
    if kind == 'tokenizer':
      ways[f'{policy}, prepare'] = functools.partial(
        _prepared,
        str(folder / '*.jsonl'),
        policy,
        out,
        str(folder / 'tokenizer.json'),
      )
    else:
      ways[policy] = functools.partial(_few_batches, str(folder), policy)
    if kind in DOCUMENTS:
      ways[f'{policy}, prepare'] = functools.partial(
        _prepared, str(folder), policy, out
      )
  for name, way in ways.items():
    message = ''
    try:
      got = way()
      outcome = 'clean'
      if kind in ('bytes', 'bpe') and 'index.json' not in what:
        for row in np.concatenate(got):
          assert row.tobytes() in _written(good / kind), 'silently another row'
    except (ValueError, OSError) as error:
      message, outcome = str(error), 'refused'
      names = re.search(f'(case|out){number}|such as .*txt', message)
      leads = isinstance(error, OSError) or re.search(HINTS, message)
      if '\n' in message or not names or not leads:
        outcome, message = 'failed', f'unclear: {error!r}'
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt):
        raise
      message, outcome = f'{error!r}'[:2000], 'failed'
    yield f'#{number} {what} ({name})', outcome, message
  shutil.rmtree(folder)
  for out in scratch.glob(f'out{number}-*'):
    shutil.rmtree(out)


def launched(number: int, seed: int, good: pathlib.Path, scratch: pathlib.Path):
  """The same for launch/train.py, as a user runs it."""
  folder = scratch / f'case{number}'
  _, what = damaged(number, seed, good, folder)
  for policy in POLICIES:
    workdir = scratch / f'run{number}-{policy}'
    settings = (
      'num_steps=2 optimizer.warmup_steps=1 model.num_blocks=1 model.dim=16 '
      f'model.ffn_dim=16 model.vocab_size={VOCAB} data.seq_len=32 '
      f'data.batch_size=2 eval_sequences=4 data.on_damage={policy}'
    ).split()
    result = subprocess.run(
      [
        sys.executable,
        ROOT / 'launch' / 'train.py',
        f'--workdir={workdir}',
        f'--config.data.path={folder}',
        *(f'--config.{setting}' for setting in settings),
      ],
      capture_output=True,
      text=True,
      errors='replace',
      check=False,
      timeout=SECONDS * 5,
    )
    lines = result.stderr.strip().splitlines()
    outcome = {0: 'clean', 2: 'refused'}.get(result.returncode, 'failed')
    errors = [line for line in lines if line.startswith('error')]
    if outcome == 'refused' and len(errors) != 1:
      outcome = 'failed'
    message = '\n'.join(lines[-20:] if outcome == 'failed' else errors)
    yield f'#{number} {what} (launch/train.py, {policy})', outcome, message
  shutil.rmtree(folder)


def _child(arguments, scratch):
  """Checks cases in a process of their own; prints a line of JSON for each."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  for number in range(arguments.first, arguments.files):
    place = scratch / 'good', scratch
    for result in check(number, arguments.seed, *place):
      print(json.dumps([number, *result]), file=out, flush=True)
    print(json.dumps([number + 1]), file=out, flush=True)


def _watched(arguments, scratch):
  """Yields results of all cases; one whose process crashed or hung failed."""
  first = 0
  while first < arguments.files:
    child = subprocess.Popen(
      [
        sys.executable,
        __file__,
        f'--files={arguments.files}',
        f'--seed={arguments.seed}',
        f'--first={first}',
        f'--child={scratch}',
      ],
      stdout=subprocess.PIPE,
      stderr=(scratch / 'stderr').open('w'),
      bufsize=0,
    )
    buffered, alive = b'', True
    while alive:
      if not select.select([child.stdout], [], [], SECONDS)[0]:
        child.kill()
        break
      part = os.read(child.stdout.fileno(), 2**16)
      alive = bool(part)
      *lines, buffered = (buffered + part).split(b'\n')
      for line in lines:
        first, *result = json.loads(line)
        if result:
          yield result
    child.wait()
    child.stdout.close()
    if first < arguments.files:
      why = (scratch / 'stderr').read_text(errors='replace')[-1500:]
      yield f'#{first}', 'failed', f'exit status {child.returncode}: {why}'
      for left in (*scratch.glob('case*'), *scratch.glob('out*')):
        shutil.rmtree(left)
      first += 1


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--files', type=int, default=500)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--launches', type=int, default=8)
  parser.add_argument('--verbose', action='store_true')
  parser.add_argument('--first', type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument('--child', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    _child(arguments, pathlib.Path(arguments.child))
    return 0
  counts = collections.Counter()
  with tempfile.TemporaryDirectory() as name:
    scratch = pathlib.Path(name)
    make_good(scratch / 'good')

    def results():
      yield from _watched(arguments, scratch)
      for number in range(arguments.launches):
        step = max(1, arguments.files // arguments.launches)
        place = scratch / 'good', scratch
        # One more each time, so that all kinds have their turn.
        case = (number * step + number) % arguments.files
        yield from launched(case, arguments.seed, *place)

    for what, outcome, message in results():
      counts[outcome] += 1
      if outcome == 'failed' or arguments.verbose:
        print(f'{outcome}: {what}: {message}', flush=True)
  print(
    f'{arguments.files} damaged files, tried in {sum(counts.values())} ways: '
    f'{counts["clean"]} gave clean batches, {counts["refused"]} were refused '
    f'in one line, {counts["failed"]} failures'
  )
  return int(bool(counts['failed']))


if __name__ == '__main__':
  sys.exit(main())
