"""Guard alerts and failed saves of finished runs, from their events.jsonl.

Runs from before there were events give None, not zero.
"""

import collections
from collections.abc import Callable, Sequence

from mhc import config as config_lib
from mhc.runtime import json_lines
from mhc.runtime import paths

HEADER = ['step', 'guard', 'what was seen', 'bound', 'what was done']
SUMMARY_HEADER = [
  'panel',
  'connection',
  'runs',
  'events by guard',
  'largest gain',
  'loss spikes',
  'rollbacks',
  'skipped updates',
  'saves failed / due',
  'corrupted checkpoints',
]
DONE = {
  'log': 'logged',
  'skip_step': 'update not made',
  'rollback': 'rolled back',
  'stop': 'run ended',
}
DAMAGED = 'damaged: '  # prefix of the reason for a checkpoint set aside


def read(folder: paths.Path) -> list[dict] | None:
  file = folder / 'events.jsonl'
  return json_lines.read_lines(file) if file.exists() else None


def first_alerts(events: Sequence[dict]) -> dict[str, dict]:
  """Maps each guard to its first event, in the order of the steps."""
  found = {}
  for event in sorted(events, key=lambda event: event['step']):
    if event['guard'] not in ('rollback', 'save'):
      found.setdefault(event['guard'], event)
  return found


def rolled_back_spikes(events: Sequence[dict]) -> list[tuple[int, float]]:
  """(step, loss) of the spikes that a run rolled back from."""
  return [
    (event['step'], event['value'])
    for event in events
    if event['guard'] == 'loss_spike' and event['policy'] == 'rollback'
  ]


def counts(
  events: list[dict] | None, metrics: list[dict], config: config_lib.Config
) -> dict:
  """Counts events for a run's row."""
  every, last = config.checkpoint_every, config.num_steps
  due = len({*range(every, last, every), last}) if every else 1
  counts = collections.Counter(event['guard'] for event in events or ())
  damaged = sum(_is_damage(event) for event in events or ())
  skipped = [
    m['optimizer/skipped'] for m in metrics if 'optimizer/skipped' in m
  ]
  row = {
    'events': dict(counts),
    'rollbacks': counts['rollback'],
    'skipped_updates': int(sum(skipped)),
    'saves_failed': counts['save'] - damaged,
    'saves_due': due,
    'damaged_states': damaged,
  }
  return row if events is not None else dict.fromkeys(row)


def table_rows(events: Sequence[dict]) -> list[list[str]]:
  """One row per event, under HEADER."""
  return [_line(event) for event in events]


def summary_table(
  rows: Sequence[dict], label: Callable[[str], str]
) -> list[list[str]]:
  """One row per panel and kind, summed over its runs, under SUMMARY_HEADER."""
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    groups.setdefault((row['panel'], row['variant']), []).append(row)
  return [
    [panel, label(kind), str(len(group)), *_sums(group)]
    for (panel, kind), group in groups.items()
  ]


def _sums(group):
  known = [row for row in group if row['events'] is not None]
  gain = max(max(row['gain_fwd_max'], row['gain_bwd_max']) for row in group)
  spikes = sum(row['loss_spikes'] for row in group)
  if not known:
    return ['not recorded', _short(gain), str(spikes), '', '', '', '']
  counts = collections.Counter()
  for row in known:
    counts.update(row['events'])
  by_guard = ', '.join(f'{guard} {n}' for guard, n in counts.most_common())

  def total(name):
    return str(sum(row[name] for row in known))

  return [
    by_guard or 'none',
    _short(gain),
    str(spikes),
    total('rollbacks'),
    total('skipped_updates'),
    f'{total("saves_failed")} / {total("saves_due")}',
    total('damaged_states'),
  ]


def _line(event):
  step, guard = str(event['step']), event['guard']
  if guard == 'save':
    done = 'set aside' if _is_damage(event) else 'not saved, went on'
    return [step, guard, event['metric'], '', done]
  seen = f'{event["metric"].removesuffix(" above")} {_short(event["value"])}'
  if guard == 'rollback':
    return [step, guard, seen, '', 'on with the data after']
  policy = event.get('policy', '')
  bound = _short(event['bound']) if event.get('bound') is not None else ''
  return [step, guard, seen, bound, DONE.get(policy, policy)]


def _is_damage(event):
  return event['guard'] == 'save' and event['metric'].startswith(DAMAGED)


def _short(value) -> str:
  """Formats a value; None stands for a number that was not finite."""
  return 'not finite' if value is None else f'{value:.4g}'
