"""What the report says of the events of runs."""

import dataclasses
import json

from mhc import config as config_lib
from mhc.experiments import events
from mhc.experiments import figure_style
from mhc.experiments import html
from mhc.experiments import plots
from mhc.experiments import results
from mhc.training import guards

CONFIG = config_lib.Config(num_steps=200, checkpoint_every=60)
GAIN = guards.Event(25, 'gain', 'composite gain', 151888.4, 10.0, 'log')
SPIKE = guards.Event(82, 'loss_spike', 'loss above', 4.62, 4.5, 'rollback')
TOLD = [
  GAIN._asdict(),
  SPIKE._asdict(),
  dict(step=82, guard='rollback', metric='back to step', value=60),
  # The steps of a rollback come again.
  dict(step=75, guard='gain', metric='composite gain', value=None, bound=10.0)
  | dict(policy='skip_step'),
  dict(step=120, guard='save', metric='No space | left', policy='log'),
  dict(step=60, guard='save', metric='damaged: no record', policy='log'),
]


def test_lines_say_what_was_seen_and_done():
  assert events.table_rows(TOLD) == [
    ['25', 'gain', 'composite gain 1.519e+05', '10', 'logged'],
    ['82', 'loss_spike', 'loss 4.62', '4.5', 'rolled back'],
    ['82', 'rollback', 'back to step 60', '', 'on with the data after'],
    ['75', 'gain', 'composite gain not finite', '10', 'update not made'],
    ['120', 'save', 'No space | left', '', 'not saved, went on'],
    ['60', 'save', 'damaged: no record', '', 'set aside'],
  ]
  # Every policy has a word for it.
  assert set(guards.SEVERITY) == set(events.DONE)


def test_first_events():
  found = events.first_alerts(TOLD)
  assert {guard: event['step'] for guard, event in found.items()} == {
    'gain': 25,
    'loss_spike': 82,
  }


def test_numbers():
  metrics = [{'step': i, 'optimizer/skipped': float(i == 9)} for i in range(20)]
  assert events.counts(TOLD, [*metrics, {'step': 20}], CONFIG) == {
    'events': {'gain': 2, 'loss_spike': 1, 'rollback': 1, 'save': 2},
    'rollbacks': 1,
    'skipped_updates': 1,
    'saves_failed': 1,
    'saves_due': 4,  # after 60, 120, 180 and 200
    'damaged_states': 1,
  }
  quiet = events.counts([], [], CONFIG)
  assert quiet['events'] == {}
  assert quiet['rollbacks'] == 0
  for every, due in ((0, 1), (200, 1), (100, 2), (300, 1)):
    config = dataclasses.replace(CONFIG, checkpoint_every=every)
    assert events.counts([], [], config)['saves_due'] == due
  assert set(events.counts(None, [], CONFIG).values()) == {None}


def row(kind, told, seed=0):
  return dict(
    panel='stress',
    variant=kind,
    seed=seed,
    gain_fwd_max=2.0 + seed,
    gain_bwd_max=1.5,
    loss_spikes=3,
    **events.counts(told, [], CONFIG),
  )


def test_what_is_watched():
  rows = [
    row('residual', None),
    row('mhc', []),
    row('hc', TOLD),
    row('hc', [GAIN._asdict()], seed=1),
    row('hc', None, seed=2),
  ]
  hc = 'gain 3, save 2, loss_spike 1, rollback 1'
  lines = events.summary_table(rows, figure_style.short)
  assert [' | '.join(line) for line in lines] == [
    'stress | residual | 1 | not recorded | 2 | 3 |  |  |  | ',
    'stress | mHC | 1 | none | 2 | 3 | 0 | 0 | 0 / 4 | 0',
    f'stress | HC | 3 | {hc} | 4 | 9 | 1 | 0 | 1 / 8 | 1',
  ]
  assert {len(line) for line in lines} == {len(events.SUMMARY_HEADER)}


def test_events_are_read(tmp_path):
  assert events.read(tmp_path) is None  # a run that is older
  with (tmp_path / 'events.jsonl').open('w') as file:
    file.writelines(json.dumps(line) + '\n' for line in TOLD)
  assert events.read(tmp_path) == TOLD
  (tmp_path / 'events.jsonl').write_text('')
  assert events.read(tmp_path) == []


def run_of(told, spikes):
  config = dataclasses.replace(CONFIG, num_steps=100)
  metrics = [
    {'step': i, 'loss/train': 5.0 if i in spikes else 2.0}
    for i in range(1, 101)
  ]
  return results.Run(config, {}, metrics, [], told)


def test_the_figure_shows_the_guards_before_the_loss():
  """Of the run with most loss spikes, gone back from or not."""
  spiky = run_of([GAIN._asdict(), SPIKE._asdict()], {71, 82})
  panels = {
    'calm': [run_of([GAIN._asdict()], set())],
    'old': [run_of(None, {50, 60})],
    'stress': [run_of([GAIN._asdict()], {71, 82}), spiky],
  }
  figure = plots.first_events(panels)
  (axis,) = figure.axes
  assert axis.get_title() == 'stress: mHC, seed 0'
  assert [text.get_text() for text in axis.get_legend().get_texts()] == [
    'step 25: guard gain',
    'step 71: loss spike',
    'step 82: guard loss_spike',
    'step 82: first of 1 rolled back',
  ]
  del panels['stress']
  assert plots.first_events(panels) is None


def test_a_page_folds_what_is_long(tmp_path):
  table = html.Table(events.HEADER, events.table_rows(TOLD), numeric=False)
  parts = [html.Heading(2, 'Events'), html.Details('HC: 6 <events>', [table])]
  text = html.markdown(parts)
  assert '<details><summary>HC: 6 &lt;events&gt;</summary>\n\n| step |' in text
  assert '| 120 | save | No space \\| left |  | not saved, went on |\n' in text
  assert text.endswith('|\n\n</details>\n')
  text = html.html('Title', parts, tmp_path)
  assert '<details><summary>HC: 6 &lt;events&gt;</summary><div' in text
  assert '<td>No space | left</td>' in text
  assert text.count('<details>') == text.count('</details>') == 1
