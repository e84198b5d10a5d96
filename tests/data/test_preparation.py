"""One folder, whatever cores, machines, parts and interruptions made it."""

import hashlib
import json
import pathlib

import numpy as np
import pytest

from mhc.data import corpus as corpus_lib
from mhc.data import corruption
from mhc.data import merge
from mhc.data import parts
from mhc.data import sources
from mhc.data import tokenize_corpus
from mhc.data import tokenizer as tokenizer_lib
from mhc.data import unfinished
from mhc.runtime import files as files_lib
from mhc.runtime import processes

WORDS = ('red ', 'green ', 'blue ', 'naïve ', '你好 ')


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """Seven files of documents, some of them empty, some of them copies."""
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  all_of_them = []
  for number in range(7):
    lines = []
    for _ in range(120):
      if all_of_them and rng.random() < 0.1:
        text = all_of_them[rng.integers(len(all_of_them))]
      else:
        text = ''.join(rng.choice(WORDS, rng.integers(0, 30)))
      all_of_them.append(text)
      lines.append(json.dumps({'text': text}))
    (folder / f'{number}.jsonl').write_text('\n'.join(lines))
  return folder


def content(folder):
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(folder.rglob('*'))
    if file.is_file() and file.name != 'index.json'
  }


def documents_of(corpus, side):
  """Texts of a side, in order."""
  found = []
  for shard in getattr(corpus, side):
    tokens = np.asarray(shard[:])
    cuts = np.flatnonzero(tokens == corpus.tokenizer.stop) + 1
    for part in np.split(tokens, cuts)[:-1]:
      found.append(corpus.tokenizer.decode(part))
  return found


@pytest.fixture(scope='module')
def undisturbed(texts, tmp_path_factory):
  """The folder that a single call makes, and what is in it."""
  out = tmp_path_factory.mktemp('made') / 'out'
  with pytest.MonkeyPatch.context() as patch:
    _small(patch)
    tokenize_corpus.prepare(str(texts), out, 'bytes', workers=1)
  return out


def _small(patch, part=3000, bucket=20_000):
  patch.setattr(tokenize_corpus, 'PART_BYTES', (part, part))
  patch.setattr(tokenize_corpus, 'BUCKET_BYTES', bucket)


def test_all_documents_are_there_once(texts, undisturbed):
  corpus = corpus_lib.load(str(undisturbed))
  given = {
    json.loads(line)['text'].encode()
    for file in texts.iterdir()
    for line in file.read_text().splitlines()
  }
  train, heldout = (documents_of(corpus, s) for s in ('train', 'heldout'))
  assert len(corpus.train) > 3
  assert sorted(train + heldout) == sorted(t for t in given if t.strip())
  # In the order of the source, as the text itself has them.
  direct = corpus_lib.load(str(texts))
  np.testing.assert_array_equal(corpus.heldout[0][:], direct.heldout[0])
  assert sorted(train) == sorted(documents_of(direct, 'train'))
  # Shuffled, by what they say.
  digests = [hashlib.blake2b(t, digest_size=16).digest() for t in train]
  numbers = [np.frombuffer(d, '<u8').tolist() for d in digests]
  assert numbers == sorted(numbers)


def test_each_file_has_a_fingerprint(texts, undisturbed, tmp_path):
  found = json.loads((undisturbed / 'sources.json').read_text())
  assert list(found) == [f'{number}.jsonl' for number in range(7)]
  for name, entry in found.items():
    file = texts / name
    assert entry['bytes'] == file.stat().st_size
    assert 100 < entry['documents'] <= 120
  assert len({entry['fingerprint'] for entry in found.values()}) == 7


@pytest.mark.parametrize('part', [500, 10**6])
def test_parts_do_not_matter(texts, undisturbed, tmp_path, monkeypatch, part):
  _small(monkeypatch, part)
  tokenize_corpus.prepare(str(texts), tmp_path / 'out', 'bytes', workers=1)
  assert content(tmp_path / 'out') == content(undisturbed)


def test_cores_do_not_matter(texts, undisturbed, tmp_path, monkeypatch):
  _small(monkeypatch)
  tokenize_corpus.prepare(str(texts), tmp_path / 'out', 'bytes', workers=2)
  assert content(tmp_path / 'out') == content(undisturbed)


def test_machines_do_not_matter(texts, undisturbed, tmp_path, monkeypatch):
  _small(monkeypatch)
  out = tmp_path / 'out'

  def on(machine, stage):
    return tokenize_corpus.prepare(
      str(texts),
      out,
      'bytes',
      workers=1,
      machine=machine,
      num_machines=3,
      stage=stage,
    )

  assert on(2, 'tokens') is None
  assert on(0, 'tokens') is None
  with pytest.raises(ValueError, match=r'lacks the tokens of 1 .*shard=1/3'):
    on(0, 'merge')
  on(1, 'tokens')
  assert [on(machine, 'merge') is None for machine in (1, 0)] == [True, True]
  index = on(2, 'merge')
  assert content(out) == content(undisturbed)
  want = json.loads((undisturbed / 'index.json').read_text())
  assert index['sha256'] == want['sha256']
  assert on(1, 'merge') == index  # again, as a job that is restarted
  with pytest.raises(ValueError, match=r'7 files, fewer than the 8 machines'):
    sources.open_source(str(texts), 'text', 0, 8)
  with pytest.raises(ValueError, match=r'--shard=0/2 needs a --stage'):
    tokenize_corpus.prepare(
      str(texts), tmp_path / 'two', 'bytes', num_machines=2
    )


class Killed(BaseException):
  pass


def test_killed_at_any_write_it_goes_on(
  texts, undisturbed, tmp_path, monkeypatch
):
  """Each time a little later, until it comes through."""
  _small(monkeypatch)
  rename, left = pathlib.Path.replace, [0]

  def counted(self, target):
    left[0] -= 1
    if left[0] == 0:
      raise Killed
    if left[0] == -1:
      raise AssertionError('written after it was killed')
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, 'replace', counted)
  out, kills, tokenised = tmp_path / 'out', 0, []
  inner = tokenize_corpus._tokenise_piece
  monkeypatch.setattr(
    tokenize_corpus,
    '_tokenise_piece',
    lambda piece, **given: (
      tokenised.append(piece.number) or inner(piece, **given)
    ),
  )
  while True:
    left[0] = 3 + kills % 4
    try:
      tokenize_corpus.prepare(str(texts), out, 'bytes', workers=1)
      break
    except Killed:
      kills += 1
  assert kills > 10
  assert content(out) == content(undisturbed)
  # Only what was not whole was done again.
  assert len(tokenised) < len(set(tokenised)) + kills


def test_a_file_that_was_repaired_is_read_again(
  texts, undisturbed, tmp_path, monkeypatch
):
  _small(monkeypatch)
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  for file in texts.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  good = (folder / '4.jsonl').read_text()
  (folder / '4.jsonl').write_text(good[:-4])
  with pytest.raises(ValueError, match=r'4\.jsonl, line 120'):
    tokenize_corpus.prepare(str(folder), out, 'bytes', workers=1)
  with pytest.raises(ValueError, match=r'is not finished: run its .* again'):
    corpus_lib.load(str(out))
  (folder / '4.jsonl').write_text(good)
  tokenize_corpus.prepare(str(folder), out, 'bytes', workers=1)
  assert content(out) == content(undisturbed)


def test_shards_of_text_that_has_changed_are_made_again(
  texts, tmp_path, monkeypatch
):
  """Killed in the merge; then a file changes."""
  _small(monkeypatch)
  folder = tmp_path / 'in'
  folder.mkdir()
  for file in texts.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  make, made = merge._make, []

  def killed(job, **given):
    made.append(job)
    if len(made) == 4:
      raise Killed
    make(job, **given)

  with monkeypatch.context() as patch:
    patch.setattr(merge, '_make', killed)
    with pytest.raises(Killed):
      tokenize_corpus.prepare(str(folder), tmp_path / 'a', 'bytes', workers=1)
  size = (folder / '6.jsonl').stat().st_size
  another = json.dumps({'text': 'another'}).ljust(size)
  (folder / '6.jsonl').write_text(another)
  tokenize_corpus.prepare(str(folder), tmp_path / 'a', 'bytes', workers=1)
  tokenize_corpus.prepare(str(folder), tmp_path / 'b', 'bytes', workers=1)
  assert content(tmp_path / 'a') == content(tmp_path / 'b')


def test_what_is_not_ours_stays(tmp_path):
  (tmp_path / 'in.txt').write_text('some text ' * 100)
  for name in ('out/parts/mine.txt', 'other/train-00000.bin'):
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text('mine')
    out = tmp_path / pathlib.Path(name).parts[0]
    with pytest.raises(
      ValueError, match=rf'not empty \({name[len(out.name) + 1 :]}'
    ):
      tokenize_corpus.prepare(str(tmp_path / 'in.txt'), out, 'bytes')
    assert file.read_text() == 'mine'
    assert [f for f in out.rglob('*') if f.is_file()] == [file]


def test_another_call_for_a_folder_is_refused(texts, tmp_path, monkeypatch):
  _small(monkeypatch)
  out = tmp_path / 'out'
  tokenize_corpus.prepare(
    str(texts), out, 'bytes', workers=1, num_machines=2, stage='tokens'
  )
  for changes, name in (
    ({'text_field': 'content'}, 'text_field'),
    ({'num_machines': 3}, 'num_machines'),
  ):
    arguments = {
      'tokenizer': 'bytes',
      'num_machines': 2,
      'machine': 1,
      'stage': 'tokens',
    } | changes
    with pytest.raises(ValueError, match=f'was begun with {name}='):
      tokenize_corpus.prepare(str(texts), out, **arguments)


def test_machines_share_a_learned_vocabulary(texts, tmp_path):
  given = {'workers': 1, 'num_machines': 2}
  arguments = str(texts), tmp_path / 'out', 'train:280'
  with pytest.raises(ValueError, match='--stage=vocabulary'):
    tokenize_corpus.prepare(*arguments, **given, stage='tokens')
  tokenize_corpus.prepare(*arguments, stage='vocabulary')
  for stage in ('tokens', 'merge'):
    for machine in (0, 1):
      index = tokenize_corpus.prepare(
        *arguments, **given, stage=stage, machine=machine
      )
  alone = tokenize_corpus.prepare(
    str(texts), tmp_path / 'alone', 'train:280', workers=1
  )
  assert content(tmp_path / 'out') == content(tmp_path / 'alone')
  assert index['num_tokens'] == alone['num_tokens'] == 280


@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_document_that_tokens_do_not_give_back(tmp_path, policy):
  """It is damage like any other."""
  plain = tokenizer_lib.BPE.train([b'some words'], 258)
  parsed = json.loads(plain.description)
  # Removes a letter from what it decodes to.
  parsed['model']['vocab'].pop('Ġ', None)
  number = plain._tokenizer.token_to_id('z')
  parsed['model']['vocab'] = {
    name: value
    for name, value in parsed['model']['vocab'].items()
    if value != number
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(parsed))
  lines = [json.dumps({'text': f'good{n}'}) for n in range(40)]
  lines[7] = json.dumps({'text': 'zebra'})
  (tmp_path / 'in.jsonl').write_text('\n'.join(lines))
  arguments = (
    str(tmp_path / 'in.jsonl'),
    tmp_path / 'out',
    str(tmp_path / 'tokenizer.json'),
    policy,
  )
  vocabulary = tokenizer_lib.load(tmp_path / 'tokenizer.json')
  if policy == 'stop':
    with pytest.raises(ValueError, match=r"jsonl:8.*lossy.*b'zebra'.*skip"):
      tokenize_corpus.prepare(*arguments)
    with pytest.raises(ValueError, match=r"jsonl:8.*lossy.*b'zebra'.*skip"):
      corpus_lib.load(arguments[0], tokenizer=vocabulary)
    return
  index = tokenize_corpus.prepare(*arguments)
  assert (index['num_documents'], index['num_skipped']) == (39, 1)
  corpus = corpus_lib.load(arguments[0], 'skip', tokenizer=vocabulary)
  assert (corpus.num_documents, corpus.num_skipped) == (39, 1)
  text = b''.join(
    documents_of(corpus, 'train') + documents_of(corpus, 'heldout')
  )
  assert b'zebra' not in text


def test_a_part_gives_its_segments_back(tmp_path):
  rng = np.random.default_rng(1)
  texts = [bytes(rng.integers(65, 70, rng.integers(1, 9))) for _ in range(300)]
  lengths = np.array(list(map(len, texts)))
  positions = rng.permutation(300).astype(np.uint64)
  tokens = np.frombuffer(b''.join(texts), np.uint8).astype(np.uint16)
  documents = parts.described(texts, lengths, positions)
  heldout = rng.random(300) < 0.2
  file = tmp_path / 'a.part'
  parts.write(file, parts.Segment(documents, tokens), heldout, 5)
  part = parts.Part(file)
  found = {}
  for segment in (*map(part.train, range(5)), part.heldout()):
    ends = segment.documents['tokens'].cumsum()
    for document, text in zip(
      segment.documents, np.split(segment.tokens, ends[:-1]), strict=True
    ):
      found[int(document['position'])] = bytes(text.astype(np.uint8))
  assert found == dict(zip(positions.tolist(), texts, strict=True))
  assert len(part.heldout_documents()) == heldout.sum()
  by_bucket = [len(part.heldout_documents(bucket)) for bucket in range(5)]
  assert sum(by_bucket) == heldout.sum()
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match='is damaged'):
    parts.Part(file)


def test_copies_in_order_of_digest():
  texts = [b'a', b'b', b'a', b'c', b'd', b'b']
  documents = parts.described(
    texts, np.ones(6, np.int64), np.array([5, 1, 2, 3, 4, 0], np.uint64)
  )
  others = parts.described([b'd'], np.ones(1, np.int64), np.zeros(1, np.uint64))
  chosen = parts.distinct(documents, others)
  assert sorted(chosen.tolist()) == [2, 3, 5]


def test_chunks_of_tokens_are_in_order(monkeypatch):
  lengths = np.array([3, 0, 5, 1, 2])
  documents = np.zeros(5, parts.DOCUMENT)
  documents['tokens'] = lengths
  tokens = np.arange(11, dtype=np.uint16)
  order = np.array([4, 2, 1, 0])
  want = [9, 10, 3, 4, 5, 6, 7, 0, 1, 2]
  for chunk in (1, 4, 100):
    monkeypatch.setattr(parts, 'CHUNK', chunk)
    got = list(parts.in_order(parts.Segment(documents, tokens), order))
    assert np.concatenate(got).tolist() == want
    assert chunk == 100 or len(got) > 1


def _square(number):
  return number * number


def test_a_map_in_order_over_processes():
  assert list(processes.ordered_map(_square, range(7), 2)) == [
    n * n for n in range(7)
  ]
  assert list(processes.ordered_map(_square, range(3), 1)) == [0, 1, 4]


def test_places_go_on_where_they_say(texts):
  source = sources.open_source(str(texts), 'text')
  log = corruption.SkipLog()
  read = list(source.read(sources.Place(), log))
  for number in (0, 100, 300, len(read) - 1):
    rest = list(source.read(source.after(read[number]), log))
    assert rest == read[number + 1 :]
  halves = [
    list(
      sources.open_source(str(texts), 'text', n, 2).read(sources.Place(), log)
    )
    for n in range(2)
  ]
  assert sorted(halves[0] + halves[1], key=lambda r: (r.file, r.number)) == read


def test_the_modules_of_a_preparation_are_named():
  for module in (merge, unfinished, files_lib):
    assert module.__doc__


def test_a_link_to_nowhere_is_left_out(tmp_path):
  (tmp_path / 'in').mkdir()
  for number in range(60):
    (tmp_path / f'in/{number}.txt').write_text(f'text {number:03d}')
  (tmp_path / 'in/b.txt').symlink_to(tmp_path / 'gone')
  arguments = str(tmp_path / 'in'), tmp_path / 'out', 'bytes'
  with pytest.raises(ValueError, match=r'b\.txt cannot be read'):
    tokenize_corpus.prepare(*arguments)
  index = tokenize_corpus.prepare(*arguments, 'skip')
  assert (index['num_skipped'], index['num_bytes']) == (1, 480)


def test_a_machine_whose_documents_are_all_damaged_ends_well(tmp_path):
  folder, out = tmp_path / 'in', tmp_path / 'out'
  folder.mkdir()
  lines = (json.dumps({'text': f'text {number}'}) for number in range(100))
  (folder / 'a.jsonl').write_text('\n'.join(lines))
  (folder / 'b.jsonl').write_text('{"text": 1}\n')
  for stage in ('tokens', 'merge'):
    for machine in (0, 1):
      index = tokenize_corpus.prepare(
        str(folder),
        out,
        'bytes',
        'skip',
        machine=machine,
        num_machines=2,
        stage=stage,
      )
  assert (index['num_documents'], index['num_skipped']) == (100, 1)
