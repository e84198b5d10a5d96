"""Curves over sizes from rows, and the progress of workers from their files."""

from example_configs import TINY_RUN
import numpy as np
import pytest

from mhc.config import comparison as comparison_lib
from mhc.experiments import curves
from mhc.experiments import jobs as jobs_lib
from mhc.experiments import progress
from mhc.runtime import console

GAIN = 1.25  # in compute


def scene(num_sizes, seeds=(0, 1, 2)):
  """(comparison, rows): mHC has the loss of GAIN times its compute."""
  panels = {
    f'size_{i}': comparison_lib.Panel(
      kinds=('residual', 'mhc'),
      seeds=seeds,
      num_blocks=(),
      learning_rates=(),
      curve='sizes',
    )
    for i in range(num_sizes)
  }
  rng, rows = np.random.default_rng(0), []
  for i, panel in enumerate(panels):
    for seed in seeds:
      shared, flops = rng.normal(0, 1e-3), 1e9 * 4.0**i
      for kind, factor in (('residual', 1.0), ('mhc', GAIN)):
        noise = rng.normal(0, 1e-5)
        loss = 1.5 + 20 * (factor * flops) ** -0.2 + shared + noise
        row = dict(panel=panel, variant=kind, seed=seed, setting={})
        row |= dict(heldout_nats=loss, tokens=1e6 * 4**i)
        rows.append({**row, 'flops': flops})
  overhead = (('mhc', 'a pod', 1.1),)
  return comparison_lib.Comparison(
    panels=panels, planned_overhead=overhead
  ), rows


def test_a_multiplier_in_flops_and_in_time():
  comparison, rows = scene(4)
  timings = {
    panel: {'mhc': {'ratio': [2.0, 1.9, 2.1]}} for panel in comparison.panels
  }
  (curve,) = curves.collect(comparison, rows, timings)
  assert (curve['kind'], curve['seeds']) == ('mhc', [3, 3, 3, 3])
  assert curve['verdict'] == 'the gap shrinks'
  found = curve['multipliers']
  names = 'FLOPs', 'time, measured', 'time, as planned for a pod'
  for name, ratio in zip(names, (1, 2, 1.1), strict=True):
    value, low, high = found[name]
    assert value == pytest.approx(GAIN / ratio, rel=0.02)
    assert low < value < high


def test_few_sizes_have_a_trend_and_no_multiplier(tmp_path):
  comparison, rows = scene(2)
  rows[0]['heldout_nats'] = np.inf  # its seed is left out
  (curve,) = curves.collect(comparison, rows, {})
  assert curve['seeds'] == [2, 3]
  assert curve['multipliers'] == {}
  parts = curves.section(tmp_path, [curve])
  assert parts[2].lines[0][-1] == 'not tested (fewer than 4 sizes)'
  assert (tmp_path / parts[3].path).exists()
  assert curves.collect(*scene(1), {}) == []


def test_progress_is_read_from_files(tmp_path, monkeypatch):
  panel = comparison_lib.Panel(
    kinds=('mhc',), seeds=(0, 1), num_blocks=(1,), num_steps=20, batch_size=4
  )
  comparison = comparison_lib.Comparison(TINY_RUN, {'p': panel})
  jobs = jobs_lib.Jobs(comparison, tmp_path)
  first, second = (tmp_path / cell.name for cell in jobs.cells())
  assert progress.share(jobs)[2:] == (0, 2)
  for folder in (first, second):
    folder.mkdir(parents=True)
  (first / 'summary.json').write_text('{}')
  (second / 'metrics.jsonl').write_text('{}\n' * 5)
  done, whole, finished, runs = progress.share(jobs)
  assert (done / whole, finished, runs) == (0.625, 1, 2)
  bar = console.share_bar()
  monkeypatch.setattr(console, 'share_bar', lambda: bar)
  with progress.Progress(jobs):
    (second / 'metrics.jsonl').write_text('{}\n' * 20)
  # What an earlier call left done says nothing of the speed.
  assert (bar.initial, bar.n) == (0.625, 1)
