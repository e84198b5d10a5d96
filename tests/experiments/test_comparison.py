"""A comparison from its settings to its report, and what the report says."""

import dataclasses
import json
import shutil

from example_configs import TINY_RUN
import jax
import numpy as np
import pytest

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.experiments import claims
from mhc.experiments import contrasts
from mhc.experiments import report
from mhc.experiments import results
from mhc.experiments import run_all

pytestmark = pytest.mark.long

KINDS = ('residual', 'hc', 'mhc', 'identity')
BASE = config.Config(
  mesh=config.MeshConfig(num_devices=1),
  model=TINY_RUN.model,
  optimizer=config.OptimizerConfig(warmup_steps=2),
  data=config.DataConfig(seq_len=16),
  eval_every=10,
  eval_sequences=16,
  final_sequences=64,
  probe_every=10,
  checkpoint_every=0,
)
PANEL = comparison_lib.Panel(
  title='A small panel',
  kinds=KINDS,
  seeds=(0, 1),
  num_blocks=(1,),
  num_steps=40,
  batch_size=2,
)


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  """(comparison, workdir) of eight tiny runs and their report."""
  folder = tmp_path_factory.mktemp('compare')
  base = dataclasses.replace(
    BASE, data=dataclasses.replace(BASE.data, path=text)
  )
  comparison = comparison_lib.Comparison(base, {'small': PANEL})
  with jax.numpy_dtype_promotion('standard'):
    run_all.train_all(comparison, folder / 'work')
  report.render(folder / 'work')
  return comparison, folder / 'work'


def test_the_report_is_whole(finished):
  _, workdir = finished
  rows = json.loads((workdir / 'results.json').read_text())
  assert [(row['variant'], row['seed']) for row in rows] == [
    (kind, seed) for seed in (0, 1) for kind in KINDS
  ]
  for row in rows:
    assert {'heldout_nats', 'bits_per_byte', 'gain_fwd_max'} <= row.keys()
    assert row['events'] == {}
    assert (row['skipped_updates'], row['saves_due']) == (0, 1)
    if row['variant'] == 'residual':
      assert row['gap_nats'] == 0
      assert row['gain_fwd_max'] == row['params_ratio'] == 1
  figures = sorted(p.name for p in workdir.glob('figures/*/*.png'))
  assert figures == [
    'gains_depth.png',
    'gains_training.png',
    'grad_norm.png',
    'loss.png',
    'mappings.png',
  ]
  markdown = (workdir / 'report.md').read_text()
  page = (workdir / 'report.html').read_text()
  for kind in ('HC', 'mHC', 'residual', 'identity'):
    assert kind in markdown
    assert kind in page
  assert page.count('data:image/png;base64,') == 5
  assert 'src="figures' not in page
  assert 'A small panel' in page
  assert '<h2>Events</h2>' in page
  assert '| small | HC | 2 | none |' in markdown
  assert '\n\nNo events.\n' in markdown


def test_rows_are_computed_from_the_files(finished):
  """A changed metrics file changes the report: nothing is remembered."""
  comparison, workdir = finished
  name = 'small/hc-b1-lr0.003-s0'
  run = results.read(workdir / name, comparison.runs('small')[name])
  (row,) = results.rows('small', [run])
  assert row['gap_nats'] is None  # no residual beside it
  norms = [m['grad/global_norm'] for m in run.metrics][results.WINDOW :]
  np.testing.assert_allclose(row['grad_norm_max'], max(norms))
  np.testing.assert_allclose(
    row['grad_norm_cv'], np.std(norms) / np.mean(norms)
  )
  composite = max(max(probe['composite_fwd']) for probe in run.probes)
  np.testing.assert_allclose(row['gain_fwd_max'], composite)


def test_events_come_into_the_report_and_old_runs_have_none(finished, tmp_path):
  _, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  told = {'step': 20, 'guard': 'gain', 'metric': 'composite gain'}
  told |= {'value': 12.5, 'bound': 10.0, 'policy': 'log'}
  file = copy / 'small' / 'hc-b1-lr0.003-s1' / 'events.jsonl'
  file.write_text(json.dumps(told) + '\n')
  (copy / 'small' / 'mhc-b1-lr0.003-s0' / 'events.jsonl').unlink()
  rows = {(row['variant'], row['seed']): row for row in report.render(copy)}
  assert rows['hc', 1]['events'] == {'gain': 1}
  assert rows['hc', 0]['events'] == {}
  assert rows['mhc', 0]['events'] is rows['mhc', 0]['rollbacks'] is None
  markdown = (copy / 'report.md').read_text()
  page = (copy / 'report.html').read_text()
  title = 'small: HC, 1 blocks, learning rate 0.003, seed 1: 1 event'
  assert f'<details><summary>{title}</summary>' in page
  assert f'<details><summary>{title}</summary>' in markdown
  assert '| 20 | gain | composite gain 12.5 | 10 | logged |' in markdown
  assert '| small | HC | 2 | gain 1 |' in markdown
  assert 'No events.' not in markdown


def test_a_second_comparison_trains_nothing(finished, capsys):
  comparison, workdir = finished
  files = {p: p.stat().st_mtime_ns for p in workdir.rglob('metrics.jsonl')}
  run_all.train_all(comparison, workdir)
  assert '8 runs' in capsys.readouterr().out
  assert all(p.stat().st_mtime_ns == t for p, t in files.items())


def test_changed_settings_are_refused_before_training(finished):
  comparison, workdir = finished
  panels = {'small': dataclasses.replace(PANEL, clip_norm=0.5)}
  before = (workdir / 'comparison.json').read_text()
  with pytest.raises(ValueError, match=r'clip_norm=1.0, this one has 0.5'):
    run_all.train_all(
      comparison_lib.Comparison(comparison.base, panels), workdir
    )
  assert (workdir / 'comparison.json').read_text() == before


def test_unfinished_runs_are_said_to_be_missing(finished, tmp_path):
  comparison, workdir = finished
  panels = {'small': dataclasses.replace(PANEL, seeds=(0, 1, 2))}
  text = json.dumps(
    dicts.to_dict(comparison_lib.Comparison(comparison.base, panels))
  )
  for path in workdir.iterdir():
    if path.name != 'comparison.json':
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'comparison.json').write_text(text)
  for name in ('results.json', 'report.md', 'report.html', 'figures'):
    (tmp_path / name).unlink()
  report.render(tmp_path)
  assert (
    '4 runs of this comparison have not finished'
    in (tmp_path / 'report.md').read_text()
  )


def run_of(norms, losses):
  metrics = [
    {'step': i + 1, 'grad/global_norm': norm, 'loss/train': loss}
    for i, (norm, loss) in enumerate(zip(norms, losses, strict=True))
  ]
  return results.Run(dataclasses.replace(BASE, num_steps=200), {}, metrics, [])


def test_spikes_are_counted_against_the_running_median():
  norms, losses = np.ones(200), np.full(200, 2.0)
  norms[1] = 100.0  # in warm-up
  norms[[60, 120]] = 3.5
  norms[150] = 2.5
  losses[80] = 3.5
  losses[90] = 2.9
  run = run_of(norms, losses)
  assert run.grad_spikes == 2
  assert run.loss_spikes == 1
  diverged = run_of([1.0] * 100 + [None] * 5, [2.0] * 105)
  assert diverged.grad_spikes == 5


def row(kind, seed=0, **values):
  defaults = dict(
    variant=kind,
    kind=kind,
    seed=seed,
    heldout_nats=2.0 + 0.001 * seed,
    gain_max=1.0 + 0.01 * seed,
    grad_norm_cv=0.5 + 0.01 * seed,
    loss_spikes=0,
    step_time_ratio=1.5,
    stream_cosine=None if kind == 'residual' else 0.5,
  )
  return {**defaults, **values}


def verdicts(rows):
  judged = contrasts.judge([*contrasts.of_kinds(rows)])
  return {c.claimed: c.verdict for c in claims.evaluate(rows, judged)}


def test_claims_follow_the_rows():
  """Four seeds like the paper's run, four without a difference, and two."""
  paper, calm = [], []
  for seed in range(4):
    noise = 1e-3 * (seed - 1.5)
    calm += [
      row(kind, seed, heldout_nats=2 + noise * (1 + (kind == 'mhc')))
      for kind in ('residual', 'hc', 'mhc')
    ]
    paper += [
      row('residual', seed, heldout_nats=2.1 + noise),
      row(
        'hc',
        seed,
        heldout_nats=2.05 + noise,
        gain_max=3000.0 + seed,
        grad_norm_cv=9.0 + seed,
        loss_spikes=2,
      ),
      row('mhc', seed, heldout_nats=2.02 + 1.1 * noise, gain_max=1.6),
    ]
  loss, gain, spikes = (
    "mHC's final loss against the plain residual's",
    "HC's composite gain against mHC's, the larger of forward and backward",
    "Runs whose loss spikes: HC's, against mHC's",
  )
  found = verdicts(paper)
  assert found[loss].startswith('lower by 0.0800 [0.0798, 0.0802]')
  assert found[gain].startswith('higher by a factor of 1,876 [')
  assert found[spikes] == "more often (Fisher's p 0.029)"
  absent = verdicts(calm)
  assert absent.keys() == found.keys()
  assert absent[loss] == 'equivalent within 0.01'
  assert absent[gain].startswith('not resolved (factor 1.00')
  assert absent[spikes] == "not resolved (Fisher's p 1.00)"
  few = verdicts([r for r in paper if r['seed'] < 2])
  for name in (loss, gain, spikes):
    assert few[name] == 'not tested (fewer than 4 seeds)'
  assert verdicts([row('residual'), row('identity')]) == {}


def test_streams_that_are_one_say_nothing_of_mixing():
  rows = [
    row(kind, seed, stream_cosine=cosine)
    for seed in range(4)
    for kind, cosine in (('residual', None), ('identity', 0.2), ('mhc', 0.999))
  ]
  judged = contrasts.judge([*contrasts.of_kinds(rows)])
  assert [(j.contrast.other, j.verdict) for j in judged] == [
    ('residual', 'equivalent within 0.01'),
    ('identity', 'not tested (streams equal: cosine 0.9990)'),
  ]


def test_a_diverged_run_is_said():
  rows = [row(k, s) for s in range(5) for k in ('residual', 'mhc')]
  rows[3]['heldout_nats'] = float('inf')
  (judged,) = contrasts.judge([*contrasts.of_kinds(rows)])
  assert judged.verdict == 'not tested (1 of 5 losses are not finite)'


def test_numbers_read_well():
  values = [0.0, 1.0, 1.4567, 12.34, 2619.65, 2.3e11, 3e-6, float('inf')]
  assert [claims.number(v) for v in values] == [
    '0',
    '1.00',
    '1.46',
    '12.3',
    '2,620',
    '2.3e+11',
    '3e-06',
    'not finite',
  ]
