"""Folders as people have them: clones of datasets, splits, links."""

import json

import numpy as np
import pytest

from mhc.data import corpus as corpus_lib
from mhc.data import corpus_files
from mhc.data import tokenize_corpus


def make(folder, *names):
  for number, name in enumerate(names):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({'text': f'{name} {number}'}) + '\n')
  return str(folder)


def test_a_clone_of_a_dataset(tmp_path):
  """What describes the records is left out, and said."""
  data = ['data/a.jsonl', 'data/b.jsonl.gz', 'notes.txt']
  meta = ['README.md', 'dataset_infos.json', 'load.py', 'LICENSE']
  found = corpus_files.find(make(tmp_path, *data, *meta, '.gitattributes'))
  assert list(found.files) == data
  assert found.left_out == {'no documents': sorted(meta)}
  assert '4 left out as no documents: LICENSE, README.md' in found.summary()


def test_source_code_keeps_its_files(tmp_path):
  """Among files of text alone README.md is one, and JSON of settings none."""
  path = make(tmp_path, 'README.md', 'a.py')
  (tmp_path / 'package.json').write_text('{\n "name": "x"\n}\n')
  found = corpus_files.find(path)
  assert list(found.files) == ['README.md', 'a.py']
  assert found.left_out == {'no documents': ['package.json']}
  # Alone it is read, and refused by its reader.
  assert list(corpus_files.find(str(tmp_path / 'package.json')).files)
  assert list(corpus_files.find(str(tmp_path / '*.json')).files)


@pytest.mark.parametrize(
  ('names', 'sides'),
  [
    (('train.jsonl', 'valid.jsonl', 'test.jsonl'), ('train', 'heldout', None)),
    (
      ('data/train-0-of-2.jsonl', 'data/validation-0.jsonl', 'x/test-0.jsonl'),
      ('train', 'heldout', None),
    ),
    (('Train/a.txt', 'dev/b.txt', 'TEST/c.txt'), ('train', 'heldout', None)),
    (('train.txt', 'test.txt'), ('', None)),
    (('train_1.txt', 'val_1.txt', 'other.txt'), ('train', 'heldout', 'train')),
    # No split is meant.
    (('test_of_time.txt', 'dev.txt'), ('', '')),
    (('training.txt', 'more.txt'), ('', '')),
    (('strain.txt', 'contest.txt', 'rival.txt'), ('', '', '')),
  ],
)
def test_splits_that_names_say(tmp_path, names, sides):
  found = corpus_files.find(make(tmp_path, *names))
  want = {n: s for n, s in zip(names, sides, strict=True) if s is not None}
  assert found.sides == want
  tests = [n for n, s in zip(names, sides, strict=True) if s is None]
  assert found.left_out.get('the test split', []) == tests


def test_the_test_split_is_never_trained_on(tmp_path, capsys):
  """Neither on the fly nor prepared; and no held-out copy is."""
  path = make(tmp_path / 'in', 'train.jsonl', 'valid.jsonl', 'test.jsonl')
  with (tmp_path / 'in/train.jsonl').open('a') as file:
    file.write((tmp_path / 'in/valid.jsonl').read_text())
  tokenize_corpus.prepare(path, tmp_path / 'out', 'bytes')
  for corpus in map(corpus_lib.load, (path, str(tmp_path / 'out'))):
    sides = []
    for shards in (corpus.train, corpus.heldout):
      tokens = np.concatenate([shard[:] for shard in shards])
      sides.append(corpus.tokenizer.decode(tokens).decode())
    assert sides == ['train.jsonl 0', 'valid.jsonl 1']
  told = capsys.readouterr()
  assert '1 files named for validation are held out' in told.out + told.err
  assert '1 left out as the test split: test.jsonl' in told.out + told.err


def test_links_are_followed_once(tmp_path):
  path = make(tmp_path / 'in', 'a.txt', 'sub/b.txt')
  make(tmp_path / 'elsewhere', 'c.txt', 'd.txt')
  (tmp_path / 'in/linked').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'in/again').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'in/sub/round').symlink_to(tmp_path / 'in')
  (tmp_path / 'in/e.txt').symlink_to(tmp_path / 'in/a.txt')
  names = list(corpus_files.find(path).files)
  assert names == ['a.txt', 'again/c.txt', 'again/d.txt', 'sub/b.txt']


def test_a_pattern_names_what_it_matches(tmp_path):
  make(tmp_path, 'a.jsonl', 'b.jsonl', 'README.md')
  found = corpus_files.find(f'{tmp_path}/*.jsonl')
  assert [name.rsplit('/')[-1] for name in found.files] == [
    'a.jsonl',
    'b.jsonl',
  ]
  assert not found.summary()
  path = make(tmp_path / 'test', 'train.txt', 'val.txt', 'more.txt')
  found = corpus_files.find(f'{path}/*.txt')
  assert sorted(found.sides.values()) == ['heldout', 'train', 'train']
