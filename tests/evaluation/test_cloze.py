"""Lines of held-out functions: what is asked, and who answers how."""

import json
import types
import zlib

from example_configs import TINY_RUN
import numpy as np
import pytest
import saved_runs

from mhc import config as config_lib
from mhc.data import documents
from mhc.data import tokenizer as tokenizer_lib
from mhc.evaluation import cloze
from mhc.evaluation import runs
from mhc.evaluation import scoring

MODULE = b"""
import somewhere_far_away
CONSTANT = "which is long enough"

def first(values):
  # a comment is never asked about
  total = sum(values)
  half = total // len(values)
  return half + total

async def second(name):
  print("hello there", name)
  for letter in name:
    print("a letter is", letter)
  return name.upper() + "!"
"""


def document(text=MODULE, name='module.py'):
  return documents.Document(name, text)


def test_an_item_is_a_line_of_a_function_among_others_of_its_file():
  found = cloze.items([document()], 10)
  assert len(found) == 2
  for item in found:
    true = item.choices[item.right]
    assert item.context + true in MODULE
    assert item.context.startswith((b'def first', b'async def second'))
    indents = {len(each) - len(each.lstrip()) for each in item.choices}
    assert len(indents) == 1
    assert len({each.strip() for each in item.choices}) == cloze.CHOICES
    for index, other in enumerate(item.choices):
      assert other.strip() in MODULE
      if index != item.right:
        function = MODULE[MODULE.index(item.context.split(b'\n')[0]) :]
        assert other.strip() not in function.split(b'\n\n')[0]
  assert found == cloze.items([document()], 10)
  many = [document(MODULE + b'# %d' % i, f'{i}.py') for i in range(40)]
  assert len(cloze.items(many, 7)) == 7
  places = {item.right for item in cloze.items(many, 60)}
  assert places == {0, 1, 2, 3}


@pytest.mark.parametrize(
  'text', [b'def broken(:\n', b'x = 1\n', b'\0', MODULE[:150]]
)
def test_text_without_functions_is_refused(text):
  with pytest.raises(ValueError, match=r'none of 1 held-out documents.*--path'):
    cloze.items([document(text)], 10)


class Scorer(scoring.Scorer):
  """Knows which text is true, or nothing, or prefers what is short."""

  tokenizer = tokenizer_lib.Bytes()

  def __init__(self, score):
    self._score = score

  def log_likelihoods(self, requests):
    assert all(context[0] == self.tokenizer.start for context, _ in requests)
    return [
      (self._score(bytes(context[1:]), bytes(text)), False)
      for context, text in requests
    ]


def test_who_knows_is_right_and_who_does_not_is_at_chance():
  texts = [
    MODULE.replace(b'first', b'f%d' % i).replace(b'second', b's%d' % i)
    for i in range(200)
  ]
  many = [document(text, f'{i}.py') for i, text in enumerate(texts)]
  asked = cloze.items(many, 400)
  whole = b'\n'.join(texts)
  found = {
    'knows': cloze.answers(
      Scorer(lambda before, line: float(before + line in whole)), asked
    ),
    'guesses': cloze.answers(
      Scorer(lambda before, line: -float(zlib.crc32(before + line))), asked
    ),
  }
  assert len(asked) == 400
  assert found['knows']['acc'].mean() == 1
  verdicts = {
    row.run: row.verdict
    for name in found
    for row in cloze.rows(name, found[name])
    if row.metric == 'acc'
  }
  assert verdicts == {'knows': 'above chance', 'guesses': 'at chance'}
  (difference,) = cloze.differences(found, 'acc')
  assert (difference.run, difference.other) == ('guesses', 'knows')
  assert difference.low < difference.mean < difference.high < -0.6
  assert 'guesses - knows: -0.' in cloze.lines([difference])[0]


def test_an_interval_of_few_items_is_as_wide_as_they_are_few():
  first, other = np.array([1.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0])
  found = {'a': {'acc_norm': first}, 'b': {'acc_norm': other}}
  (difference,) = cloze.differences(found)
  # t of two degrees of freedom, by the standard error of a third.
  np.testing.assert_allclose(difference.high + 1 / 3, 4.3027 / 3, rtol=1e-4)


def test_a_line_is_weighed_by_its_bytes():
  (item,) = cloze.items([document(MODULE)], 1)
  found = cloze.answers(Scorer(lambda _, line: -float(len(line))), [item])
  shortest = np.argmin([len(each) for each in item.choices])
  assert found['acc'][0] == (shortest == item.right)
  assert found['acc_norm'][0] == (item.right == 0)  # all are equal


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (dict(mixture=('a=1', 'b=1')), r"data.mixture=\('a=1', 'b=1'\).*--path"),
    (
      dict(task=config_lib.TaskConfig('copy'), seq_len=128),
      r"data.task.name='copy'.*--path",
    ),
  ],
)
def test_runs_on_no_one_text_need_a_path(settings, message, tmp_path):
  data = config_lib.DataConfig(**settings)
  with pytest.raises(ValueError, match=message):
    cloze.heldout_documents(data)
  (tmp_path / 'a.py').write_bytes(MODULE)
  (found,) = cloze.heldout_documents(data, str(tmp_path / 'a.py'))
  assert MODULE.endswith(found.text)


def test_each_run_is_scored_and_recorded(monkeypatch, tmp_path, capsys):
  given = types.SimpleNamespace(
    workdir=['a', 'b'], tokenizer=None, batch_size=4, out=str(tmp_path)
  )
  monkeypatch.setattr(runs, 'flags', types.SimpleNamespace(FLAGS=given))
  record = dict(requests=1, seconds=1.0, truncated={})
  scorer = types.SimpleNamespace(record=lambda: record)
  monkeypatch.setattr(runs.scoring, 'of_run', lambda *_: scorer)

  def rows_of(name, scorer):
    return cloze.rows(name, {'acc': np.array([0.0, 1.0])})

  runs.score(rows_of, 2)
  found = json.loads((tmp_path / 'results.json').read_text())
  assert [row['run'] for row in found['rows']] == ['a', 'b']
  assert found['runs'] == {'a': record, 'b': record}
  assert found['limit'] == 2
  assert (tmp_path / 'table.md').read_text() in capsys.readouterr().out


def test_the_main_compares_runs(launch, tmp_path):
  for seed in (0, 1):
    saved_runs.save_run(tmp_path / f'run{seed}', TINY_RUN.model, seed)
  for index in range(60):
    (tmp_path / f'{index}.py').write_bytes(MODULE + b'# %d' % index)
  done = launch(
    'cloze.py',
    f'--workdir={tmp_path}/run0,{tmp_path}/run1',
    f'--path={tmp_path}/*.py',
    '--items=4',
    f'--out={tmp_path}/out',
  )
  assert done.returncode == 0, done.stderr
  assert 'of the items right by acc_norm' in done.stdout
  found = json.loads((tmp_path / 'out/results.json').read_text())
  assert {row['task'] for row in found['rows']} == {'cloze'}
