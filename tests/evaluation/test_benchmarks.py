"""Definitions of tasks for local files, and the table of what they give."""

import json
import math
import os
import sys

import numpy as np
import pytest

from mhc.evaluation import summary
from mhc.evaluation import tasks
from mhc.runtime import paths

# Of the files that lm_eval ships what is read of them.
SHIPPED = {
  'piqa/piqa.yaml': 'task: piqa\ndataset_path: baber/piqa\n',
  'gsm8k/gsm8k.yaml': 'task: gsm8k\ndataset_name: main\n',
  'mmlu/default/mmlu_anatomy.yaml': '"dataset_name": "anatomy"\n'
  '"task": "mmlu_anatomy"\n',
  'mmlu/default/mmlu_virology.yaml': '"dataset_name": "virology"\n'
  '"task": "mmlu_virology"\n',
  'mmlu/default/_mmlu.yaml': 'group: mmlu\n',
  'minerva_math/minerva_math_num_theory.yaml': 'task: minerva_math_num_theory\n'
  'dataset_name: number_theory\n',
  'minerva_math/minerva_math500.yaml': 'task: minerva_math500\n'
  'dataset_name: default\n',
}
DATA = (
  *('piqa/validation', 'mmlu/anatomy/dev', 'mmlu/anatomy/test'),
  *('mmlu/virology/dev', 'mmlu/virology/test', 'minerva_math/number_theory'),
)


@pytest.fixture
def folders(tmp_path):
  """The data and the shipped tasks."""
  data, shipped = tmp_path / 'data', tmp_path / 'lm_eval' / 'tasks'
  for name in DATA:
    file = data / f'{name}.jsonl'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{}\n')
  for name, text in SHIPPED.items():
    file = shipped / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  (tmp_path / 'lm_eval' / '__init__.py').write_text('')
  return data, shipped


def test_local_tasks_include_the_shipped_ones(folders, tmp_path):
  data, shipped = folders
  names = ('piqa', 'mmlu', 'minerva_math', 'arc_easy')
  local = tasks.local_tasks(names, data, tmp_path / 'out', shipped)
  assert local.names == names[:3]
  found = {
    file.stem: json.loads(file.read_text()) for file in local.folder.iterdir()
  }
  assert found.keys() == {
    *('piqa', 'mmlu', 'mmlu_anatomy', 'mmlu_virology'),
    *('minerva_math', 'minerva_math_num_theory'),
  }
  assert found['piqa'] == {
    'include': str(shipped / 'piqa' / 'piqa.yaml'),
    'task': 'piqa',
    'num_fewshot': 0,
    'dataset_path': 'json',
    'dataset_name': None,
    'dataset_kwargs': {
      'data_files': {'validation': str(data / 'piqa' / 'validation.jsonl')}
    },
    'training_split': None,
  }
  anatomy = found['mmlu_anatomy']
  assert anatomy['num_fewshot'] == 5
  assert anatomy['dataset_kwargs']['data_files'] == {
    split: str(data / 'mmlu' / 'anatomy' / f'{split}.jsonl')
    for split in ('dev', 'test')
  }
  assert found['mmlu']['task'] == ['mmlu_anatomy', 'mmlu_virology']
  (average,) = found['mmlu']['aggregate_metric_list']
  assert (average['metric'], average['weight_by_size']) == ('acc', True)
  theory = found['minerva_math_num_theory']
  assert theory['dataset_kwargs']['data_files'] == {
    'test': str(data / 'minerva_math' / 'number_theory.jsonl')
  }


def test_files_that_are_missing_are_named(folders, tmp_path):
  data, shipped = folders
  for name, message in (
    ('gsm8k', r'data/gsm8k/train\.jsonl does not exist.*task gsm8k'),
    ('triviaqa', r'lm_eval ships no .*triviaqa/default\.yaml'),
  ):
    with pytest.raises(ValueError, match=message):
      tasks.local_tasks([name], data, tmp_path / 'out', shipped)
  (data / 'mmlu' / 'virology' / 'dev.jsonl').unlink()
  with pytest.raises(ValueError, match=r'virology/dev\.jsonl.*mmlu_virology'):
    tasks.local_tasks(['mmlu'], data, tmp_path / 'out', shipped)


def test_the_network_is_off_where_all_is_local(folders, tmp_path, monkeypatch):
  data, _ = folders
  variables = ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE')
  for name in variables:
    monkeypatch.setenv(name, '0')
  monkeypatch.delitem(sys.modules, 'lm_eval', raising=False)
  monkeypatch.syspath_prepend(str(tmp_path))
  for names, there, expected in (
    (['piqa', 'arc_easy'], str(data), '0'),
    (['piqa', 'mmlu'], None, '0'),
    (['piqa', 'mmlu'], str(data), '1'),
  ):
    local = tasks.prepare(names, there, str(tmp_path / 'out'))
    assert local.folder == tmp_path / 'out' / 'tasks'
    assert [os.environ[name] for name in variables] == [expected] * 2


def test_tasks_of_the_hub_have_the_shots_of_the_paper(folders, tmp_path):
  _, shipped = folders
  local = tasks.local_tasks(['gsm8k'], None, tmp_path / 'out', shipped)
  assert json.loads((local.folder / 'gsm8k.yaml').read_text()) == {
    'include': str(shipped / 'gsm8k' / 'gsm8k.yaml'),
    'task': 'gsm8k',
    'num_fewshot': 8,
  }


def test_without_the_harness_the_way_out_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  monkeypatch.delitem(sys.modules, 'mhc.evaluation.harness', raising=False)
  message = r"lm_eval, which is not installed: pip install 'mhc-jax\[eval\]'"
  with pytest.raises(ValueError, match=message):
    from mhc.evaluation import harness  # noqa: F401
  monkeypatch.setattr(tasks.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=message):
    tasks.shipped()


def results(value, error):
  """What the harness gives for a group of two tasks and one of free text."""

  def samples(number, choices):
    return [
      {'doc_id': i, 'arguments': [()] * choices, 'metrics': ['acc']}
      for i in range(number)
    ]

  of = {'acc,none': value, 'acc_stderr,none': error, 'alias': 'a', 'name': 'a'}
  written = {
    'exact_match,strict': 0.0,
    'exact_match_stderr,strict': 0.0,
    'perplexity,none': 3.0,
    'perplexity_stderr,none': 'N/A',
  }
  configs = {
    'two': {'output_type': 'multiple_choice'},
    'four': {'output_type': 'multiple_choice'},
    'free': {'output_type': 'generate_until'},
  }
  return {
    'results': {'two': of, 'four': of, 'free': written, 'both': of},
    'groups': {'both': of},
    'group_subtasks': {'both': ['two', 'four']},
    'configs': configs,
    'n-samples': {
      'two': {'effective': 100},
      'four': {'effective': 300},
      'free': {'effective': 10},
    },
    'samples': {
      'two': samples(100, 2),
      'four': samples(300, 4),
      'free': samples(10, 1),
    },
  }


def test_the_table_knows_what_guessing_gives(tmp_path):
  found = summary.rows('mine', results(0.33, 0.02))
  rows = {(row.task, row.metric): row for row in found}
  assert len(found) == len(rows) == 5
  both = rows['both', 'acc']
  np.testing.assert_allclose(both.chance, (100 / 2 + 300 / 4) / 400)
  assert both.documents == 400
  assert {name: row.verdict for name, row in rows.items()} == {
    ('two', 'acc'): 'below chance',
    ('four', 'acc'): 'above chance',
    ('both', 'acc'): 'at chance',
    ('free', 'exact_match, strict'): 'at chance',
    ('free', 'perplexity'): '',
  }
  assert math.isnan(rows['free', 'perplexity'].standard_error)
  cut = {'requests': 2, 'tokens': 30, 'limited': 1}
  records = {'mine': {'requests': 9, 'seconds': 3.0, 'truncated': cut}}
  summary.write(paths.path(str(tmp_path / 'out')), found, records, 7)
  table = (tmp_path / 'out' / 'table.md').read_text()
  line = '| mine | both | acc | 400 | 0.3300 | 0.0200 | 0.3125 | at chance |'
  assert line in table
  assert '| mine | free | perplexity | 10 | 3.0000 |  |  |  |' in table
  assert '9 requests in 3.0 s with compilation, 3 a second' in table
  assert '2 contexts lost 30 tokens' in table
  read = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert read['limit'] == 7
  assert read['runs'] == records
  assert [row['verdict'] for row in read['rows']] == [
    row.verdict for row in found
  ]
  assert None in [row['standard_error'] for row in read['rows']]


def row(run, value, documents=400):
  error = math.sqrt(value * (1 - value) / documents)
  return summary.Row(run, 'piqa', 'acc', documents, value, error, 0.5)


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ((0.53, 0.45), 'no ranking: at chance'),
    ((0.60, 0.62), 'no ranking: not resolved'),
    ((0.60, 0.52), 'a is the best'),
    ((0.60, 0.70, 0.51), 'b is the best'),
    ((0.62, 0.70, 0.69), 'no ranking: not resolved'),
  ],
)
def test_the_best_of_runs_is_said_only_where_it_is_seen(values, said):
  found = [row(*one) for one in zip('abc', values, strict=False)]
  assert summary.best(found) == [('piqa', 'acc', said)]
  assert said in summary.markdown(found, {})


def test_few_answers_that_are_alike_prove_nothing():
  """Their estimated error is 0; a guesser's is not."""
  assert row('a', 1.0, documents=3).verdict == 'at chance'
  assert row('a', 1.0, documents=30).verdict == 'above chance'
  assert summary.best([row('a', 0.9)]) == []
