"""Levels of a task: when runs solve them, and what a report says of it."""

import json

import numpy as np

from mhc import config as config_lib
from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.experiments import html
from mhc.experiments import results
from mhc.experiments import solved

METRICS = [
  {'step': 10, 'loss/train': 2.0},
  {'step': 20, 'loss/train': 1.0, 'accuracy/1': 0.91, 'accuracy/4': 0.2},
  {'step': 40, 'loss/train': 1.0, 'accuracy/1': 0.85, 'accuracy/4': 0.3},
  {'step': 60, 'loss/train': 0.5, 'accuracy/1': 1.0, 'accuracy/4': 0.899},
]


def test_a_level_is_solved_when_nine_of_ten_are_right():
  run = results.Run(config_lib.Config(), {}, METRICS, [])
  assert run.solved == {'1': 20, '4': None}
  assert results.Run(config_lib.Config(), {}, METRICS[:1], []).solved == {}


def rows():
  steps = {'mhc': (20, 40, None, 60), 'residual': (None,) * 4}
  return [
    {
      'panel': 'hops',
      'variant': design,
      'setting': {'model.num_blocks': 4},
      'steps': 80,
      'solved': {'1': 20, '4': step},
      'chance': {'1': 0.25, '4': 1e-3},
    }
    for design, found in steps.items()
    for step in found
  ]


def test_seeds_are_counted_with_their_interval(tmp_path):
  parts = solved.section(tmp_path, 'hops', rows())
  text = html.markdown(parts)
  assert '| level 1 (0.25 by chance) | level 4 (0.001 by chance) |' in text
  assert '4 of 4 [40%, 100%], 20 steps' in text
  assert '3 of 4 [19%, 99%], 40 steps' in text
  assert '0 of 4 [0%, 60%] |' in text
  assert (tmp_path / 'figures/solved_hops.png').stat().st_size > 10_000
  assert solved.section(tmp_path, 'text', rows()) == []
  of_text = [{**row, 'solved': {}} for row in rows()]
  assert solved.section(tmp_path, 'hops', of_text) == []


def test_curves_rise_where_runs_get_there():
  x, y = solved.survival([20, 40, None, 60], 80)
  np.testing.assert_array_equal(x, [0, 20, 40, 60, 80])
  np.testing.assert_array_equal(y, [0, 0.25, 0.5, 0.75, 0.75])


def test_the_panel_is_of_tasks_that_fit():
  from mhc.configs import hops

  values = json.loads(hops.get_config().to_json())
  comparison = dicts.from_dict(comparison_lib.Comparison, values)
  for name in comparison.panels:
    for cell in comparison.cells(name):
      assert cell.config.data.task.name == name
