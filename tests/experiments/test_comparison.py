"""A comparison from its settings to its report, and what the report says."""

import dataclasses
import json
import pathlib
import re
import shutil

from example_configs import TINY_RUN
import jax
from matplotlib import figure
import numpy as np
import pytest
from scipy import stats

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.experiments import claims
from mhc.experiments import contrasts
from mhc.experiments import declared
from mhc.experiments import html
from mhc.experiments import report
from mhc.experiments import results
from mhc.experiments import run_all
from mhc.experiments import timing
from mhc.experiments import tuning
from mhc.runtime import source

pytestmark = pytest.mark.long

KINDS = ('residual', 'hc', 'mhc')
BASE = config.Config(
  mesh=config.MeshConfig(num_devices=1),
  model=TINY_RUN.model,
  optimizer=config.OptimizerConfig(warmup_steps=2),
  data=config.DataConfig(seq_len=16),
  eval_every=10,
  eval_sequences=16,
  final_sequences=64,
  probe_every=10,
  probe_sequences=2,
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
  """(comparison, workdir) of six tiny runs and their report."""
  folder = tmp_path_factory.mktemp('compare')
  base = dataclasses.replace(
    BASE, data=dataclasses.replace(BASE.data, path=text)
  )
  comparison = comparison_lib.Comparison(base, {'small': PANEL})
  with jax.numpy_dtype_promotion('standard'):
    run_all.train_all(comparison, folder / 'work')
  report.render(folder / 'work')
  return comparison, folder / 'work'


@pytest.fixture
def no_pictures(monkeypatch):
  """Leaves pictures empty, which take most of a report's time."""

  def save(_, file, **how):
    if not hasattr(file, 'write'):
      pathlib.Path(file).touch()

  monkeypatch.setattr(figure.Figure, 'savefig', save)


def test_the_report_is_whole(finished):
  _, workdir = finished
  values = json.loads((workdir / 'results.json').read_text())
  assert values['schema'] == report.SCHEMA
  rows = values['rows']
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
  assert [c['verdict'] for c in values['contrasts']] == [
    'not tested (fewer than 4 seeds)'
  ] * 2
  figures = {p.name for p in workdir.rglob('figures/**/*.png')}
  assert figures >= {
    *('forest.png', 'gains_depth.png', 'gains_training.png'),
    *('grad_norm.png', 'loss.png', 'mappings.png', 'contraction_small.png'),
  }
  markdown = (workdir / 'report.md').read_text()
  page = (workdir / 'report.html').read_text()
  for kind in ('HC', 'mHC', 'residual'):
    assert kind in markdown
    assert kind in page
  assert page.count('data:image/png;base64,') == page.count('<figure>') > 5
  assert 'src="figures' not in page
  assert 'A small panel' in page
  assert '<h2>Events</h2>' in page
  assert '<h2>Goodput</h2>' in page
  assert all(0 < row['goodput'] < 1 for row in rows)
  assert {row['starts'] for row in rows} == {1}
  assert {row['lost_steps'] for row in rows} == {0}
  assert '| small | HC | 2 | none |' in markdown
  assert '\n\nNo events.\n' in markdown
  assert 'does not show' not in page
  assert ': shows' not in page
  table = (workdir / 'results.csv').read_text().splitlines()
  assert len(table) == 7
  assert table[0].startswith('panel,variant,')


def test_step_times_are_measured_in_turn(finished):
  _, workdir = finished
  found = timing.read(workdir, 'small')
  assert {*found} == {*KINDS, 'device'}
  assert found['residual']['ratio'] == [1, 1, 1]
  assert all(found[kind]['step_s'] > 0 for kind in KINDS)


def test_rows_are_computed_from_the_files(finished):
  """A changed metrics file changes the report: nothing is remembered."""
  _, workdir = finished
  run = results.read(workdir / 'small/hc-b1-lr0.003-s0')
  (row,) = results.rows('small', [run])
  assert row['gap_nats'] is None  # no residual beside it
  norms = [m['grad/global_norm'] for m in run.metrics][results.WINDOW :]
  np.testing.assert_allclose(row['grad_norm_max'], max(norms))
  np.testing.assert_allclose(
    row['grad_norm_cv'], np.std(norms) / np.mean(norms)
  )
  composite = max(max(probe['composite_fwd']) for probe in run.probes)
  np.testing.assert_allclose(row['gain_fwd_max'], composite)
  nats = np.load(workdir / 'small/hc-b1-lr0.003-s0/heldout.npy')
  np.testing.assert_allclose(nats.mean() / 16, row['heldout_nats'], rtol=1e-6)


def test_numbers_follow_from_the_results(finished):
  """The contrasts of the report, from the rows of results.json alone."""
  _, workdir = finished
  values = json.loads((workdir / 'results.json').read_text())
  markdown = (workdir / 'report.md').read_text()
  loss = {(r['variant'], r['seed']): r['heldout_nats'] for r in values['rows']}
  for c in values['contrasts']:
    gaps = [loss[c['kind'], s] - loss[c['other'], s] for s in c['seeds']]
    np.testing.assert_allclose(gaps, c['differences'])
    test = stats.ttest_1samp(gaps, 0)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose(
      [np.mean(gaps), *interval, test.pvalue],
      [c['mean'], c['low'], c['high'], c['p']],
      rtol=1e-6,
    )
    said = f'{np.mean(gaps):+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]'
    assert said in markdown
  for kind in KINDS:
    nats = [loss[kind, seed] for seed in (0, 1)]
    assert f'{np.mean(nats):.4f} ({min(nats):.3f}-{max(nats):.3f})' in markdown


@pytest.mark.usefixtures('no_pictures')
def test_events_come_into_the_report_and_old_runs_have_none(finished, tmp_path):
  _, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  told = {'step': 20, 'guard': 'gain', 'metric': 'composite gain'}
  told |= {'value': 12.5, 'bound': 10.0, 'policy': 'log'}
  file = copy / 'small' / 'hc-b1-lr0.003-s1' / 'events.jsonl'
  file.write_text(json.dumps(told) + '\n')
  (copy / 'small' / 'mhc-b1-lr0.003-s0' / 'events.jsonl').unlink()
  rows = {
    (row['variant'], row['seed']): row for row in report.render(copy)['rows']
  }
  assert rows['hc', 1]['events'] == {'gain': 1}
  assert rows['hc', 0]['events'] == {}
  assert rows['mhc', 0]['events'] is rows['mhc', 0]['rollbacks'] is None
  markdown = (copy / 'report.md').read_text()
  page = (copy / 'report.html').read_text()
  title = 'small: HC, 1 block, rate 0.003, seed 1: 1 event'
  assert f'<details><summary>{title}</summary>' in page
  assert f'<details><summary>{title}</summary>' in markdown
  assert '| 20 | gain | composite gain 12.5 | 10 | logged |' in markdown
  assert '| small | HC | 2 | gain 1 |' in markdown
  assert 'No events.' not in markdown


@pytest.mark.usefixtures('no_pictures')
def test_a_page_is_drawn_again_when_it_may_differ(
  finished, tmp_path, monkeypatch
):
  _, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  page = copy / 'report.html'

  def drawn(commit='0123456789', **how):
    monkeypatch.setattr(source, 'commit', lambda: commit)
    page.write_text('as it was')
    report.render(copy, **how)
    return page.read_text() != 'as it was'

  assert drawn(keep=True)  # the fixture's was drawn by another commit
  assert not drawn(keep=True)
  told = {'step': 20, 'guard': 'gain', 'metric': 'composite gain'}
  told |= {'value': 12.5, 'bound': 10.0, 'policy': 'log'}
  file = copy / 'small' / 'hc-b1-lr0.003-s1' / 'events.jsonl'
  file.write_text(json.dumps(told) + '\n')
  assert drawn('0123456789-dirty', keep=True)
  assert drawn('0123456789-dirty', keep=True)  # changed in between, perhaps


@pytest.mark.usefixtures('no_pictures')
def test_damaged_runs_are_left_out_and_named(finished, tmp_path, capsys):
  _, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  runs = copy / 'small'
  (runs / 'hc-b1-lr0.003-s1/summary.json').write_text('')
  (runs / 'hc-b1-lr0.003-s0/summary.json').write_text('{"tokens": 1}')
  (runs / 'mhc-b1-lr0.003-s0/probes.jsonl').unlink()
  (runs / 'mhc-b1-lr0.003-s1/config.json').write_text('null')
  # An array of objects is a pickle, which is a program.
  objects = np.array([{'a': 1}], dtype=object)
  file = runs / 'residual-b1-lr0.003-s1/heldout.npy'
  np.save(file, objects, allow_pickle=True)
  values = report.render(copy)
  assert [row['variant'] for row in values['rows']] == ['residual']
  for text in ((copy / 'report.md').read_text(), capsys.readouterr().err):
    for file, what in (
      ('hc-b1-lr0.003-s1/summary.json', 'it is empty'),
      ('hc-b1-lr0.003-s0/summary.json', "it has no 'heldout_nats'"),
      ('mhc-b1-lr0.003-s0/probes.jsonl', 'it is gone'),
      ('mhc-b1-lr0.003-s1/config.json', 'it holds null'),
      ('residual-b1-lr0.003-s1/heldout.npy', ''),
    ):
      assert f'{file} is damaged: {what}' in text
  assert declared.read(copy).panels.keys() == {'small'}
  assert declared.read(tmp_path) is None
  for content in ('', '[]', '{}', '{"panels": 3}', '{"panels": {"a": 1}}'):
    (copy / 'comparison.json').write_text(content)
    with pytest.raises(ValueError, match=r'comparison\.json is '):
      report.render(copy)


def test_names_in_markdown_are_text():
  """As in HTML: a file or a panel may have any name."""
  name = '<script>x</script> [a](javascript:b) & ![c](d)\n# no heading'
  parts = [html.Heading(2, name), name, html.Table(['a'], [[name + '|']])]
  text = html.markdown(parts)
  assert '](' not in text
  text += html.markdown([html.Details(name, parts)])
  assert '<script' not in text
  assert not re.search('^# no', text, re.MULTILINE)
  assert html.markdown(['a **b** `c_d`']) == 'a **b** `c_d`\n'


def test_a_second_comparison_trains_nothing(finished, capsys):
  comparison, workdir = finished
  files = {p: p.stat().st_mtime_ns for p in workdir.rglob('metrics.jsonl')}
  run_all.train_all(comparison, workdir)
  assert '7 runs' in capsys.readouterr().out
  assert all(p.stat().st_mtime_ns == t for p, t in files.items())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(clip_norm=0.5), 'clip_norm=1.0, this one has 0.5'),
    (dict(contrasts=(('hc', 'residual'),)), 'declared before its runs'),
    (dict(margin=0.02), r'margin=0.02, but .* begun with 0.01'),
    (dict(role='explore'), "role='explore', but"),
  ],
)
def test_changes_are_refused_before_training(finished, changes, message):
  comparison, workdir = finished
  panels = {'small': dataclasses.replace(PANEL, **changes)}
  before = (workdir / 'comparison.json').read_text()
  with pytest.raises(ValueError, match=message):
    run_all.train_all(
      comparison_lib.Comparison(comparison.base, panels), workdir
    )
  assert (workdir / 'comparison.json').read_text() == before


@pytest.mark.usefixtures('no_pictures')
def test_added_seeds_are_told(finished, tmp_path):
  """They are missing, and were not declared."""
  comparison, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'copy')
  panels = {'small': dataclasses.replace(PANEL, seeds=(0, 1, 2))}
  more = comparison_lib.Comparison(comparison.base, panels)
  run_all.prepare(more, copy)
  report.render(copy)
  text = (copy / 'report.md').read_text()
  assert '3 runs of this comparison have not finished' in text
  assert 'seeds [2] were added after it had begun** with [0, 1]' in text


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
    panel='p',
    setting={},
    variant=kind,
    kind=kind,
    seed=seed,
    heldout_nats=2.0 + 0.001 * seed,
    heldout_blocks=None,
    gain_max=1.0 + 0.01 * seed,
    grad_norm_cv=0.5 + 0.01 * seed,
    loss_spikes=0,
    step_time_ratio=1.5,
    stream_cosine=None if kind == 'residual' else 0.5,
  )
  return {**defaults, **values}


def judged_of(rows, choices=None, **changes):
  """The verdicts on rows of one panel without axes."""
  panel = comparison_lib.Panel(
    **{
      'kinds': tuple(dict.fromkeys(r['variant'] for r in rows)),
      'seeds': tuple(dict.fromkeys(r['seed'] for r in rows)),
      'num_blocks': (),
      'learning_rates': (),
      **changes,
    }
  )
  comparison = comparison_lib.Comparison(panels={'p': panel})
  found = contrasts.collect(comparison, rows, {'': choices or {}})
  return contrasts.judge(found)


def verdicts(rows):
  claimed = claims.evaluate(rows, judged_of(rows))
  return {claim.claimed: claim.verdict for claim in claimed}


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
  judged = judged_of(rows)
  assert [(j.contrast.other, j.verdict) for j in judged] == [
    ('residual', 'equivalent within 0.01'),
    ('identity', 'not tested (streams equal: cosine 0.9990)'),
  ]


def test_a_diverged_run_is_said():
  rows = [row(k, s) for s in range(5) for k in ('residual', 'mhc')]
  rows[3]['heldout_nats'] = float('inf')
  (judged,) = judged_of(rows)
  assert judged.verdict == 'not tested (1 of 5 losses are not finite)'


def test_a_rate_at_the_edge_is_not_tested():
  rows = [row(k, s) for s in range(5) for k in ('residual', 'mhc')]
  tuned = [
    dict(variant='mhc', lr=rate, heldout_nats=loss)
    for rate, loss in ((0.1, 2.0), (0.2, 1.9), (0.4, None))
  ]
  choices = tuning.choose(tuned, 5.0)
  assert (choices['mhc'].rate, choices['mhc'].at_edge) == (0.2, False)
  np.testing.assert_allclose(choices['mhc'].sensitivity, (0.1 + 0 + 3.1) / 3)
  (judged,) = judged_of(rows, choices)
  assert judged.verdict == 'equivalent within 0.01'
  choices = tuning.choose(tuned[:2], 5.0)
  (judged,) = judged_of(rows, choices)
  assert judged.verdict == 'not tested (best rate of mhc at the edge: 0.2)'


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
