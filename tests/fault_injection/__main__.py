"""Injects faults into small training runs and counts those that survive.

    python tests/fault_injection                      # 50 trials, minutes
    python tests/fault_injection --trials=10 --faults=killed_in_save,flipped
    python tests/fault_injection --trials=100 --random=3   # three faults each
    python tests/fault_injection --every=20 --minutes=10   # how much is trained
    python tests/fault_injection --json

Each trial is a run with a fault (`kinds.py`), restarted until it is finished,
and compared bit for bit with an undisturbed one; see harness.py. Folders of
failed trials are kept. A full disk is a small tmpfs, which requires the right
to mount it.
"""

import collections
import json
import pathlib
import statistics
import sys
import tempfile

from absl import flags
import harness
import kinds

from mhc.runtime import cli
from mhc.runtime import console

TRIALS = flags.DEFINE_integer('trials', 50, 'Number of trials.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the fault schedule.')
FAULTS = flags.DEFINE_list(
  'faults',
  None,
  f'Faults to inject, of {", ".join(kinds.ALL)}; by default all.',
)
RANDOM = flags.DEFINE_integer(
  'random', 1, 'Faults of a trial, drawn where there are several.', 1
)
EVERY = flags.DEFINE_float(
  'every', None, 'Instead of trials, kill one run after as many seconds each.'
)
MINUTES = flags.DEFINE_float('minutes', 10, 'How long, with --every.')
JOBS = flags.DEFINE_integer('jobs', 2, 'Parallel trials.', lower_bound=1)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the trials; by default a temporary one.'
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main():
  for name in FAULTS.value or ():
    if name not in kinds.ALL:
      raise ValueError(
        f'--faults={name} is unknown: choose from {", ".join(kinds.ALL)}'
      )
  root = pathlib.Path(WORKDIR.value or tempfile.mkdtemp(prefix='faults-'))
  if EVERY.value:
    found = harness.goodput_under(
      root, 60 * MINUTES.value, EVERY.value, SEED.value
    )
    print(json.dumps(found, indent=None if JSON.value else 2))
    return
  chosen = [kinds.ALL[name] for name in FAULTS.value or kinds.ALL]
  done = collections.defaultdict(list)
  with console.progress_bar(TRIALS.value, 0, 'trials') as bar:
    for trial in harness.trials(
      root, TRIALS.value, SEED.value, chosen, JOBS.value, RANDOM.value
    ):
      for name in {*trial.fault.split('+')}:
        done[name].append(trial)
      verdict = 'survived' if trial.survived else 'FAILED'
      console.print_line(
        f'{trial.number:3} {trial.fault:16} {verdict} ({trial.seconds:.0f} s): '
        f'{trial.said}'
      )
      bar.update()
  everything = {trial for group in done.values() for trial in group}
  rows = [_row(name, group) for name, group in done.items()]
  rows.append(_row('all', everything))
  if JSON.value:
    print(json.dumps({row['fault']: row for row in rows}))
  else:
    print(
      '| fault | survived | tried | goodput | lost steps | what happens |\n'
      '|---|---:|---:|---:|---:|---|'
    )
    for row in rows:
      what = kinds.ALL[row['fault']].what if row['fault'] != 'all' else ''
      print('|', *(f'{value} |' for value in (*row.values(), what)))
  if not all(trial.survived for trial in everything):
    print(f'the failed trials are in {root}', file=sys.stderr)
    sys.exit(1)


def _row(name, group):
  """Counts, and medians over those that survived."""
  known = [trial for trial in group if trial.goodput is not None]
  return {
    'fault': name,
    'survived': sum(trial.survived for trial in group),
    'tried': len(group),
    'goodput': known
    and round(statistics.median(trial.goodput for trial in known), 3),
    'lost_steps': known
    and round(statistics.median(trial.lost_steps for trial in known)),
  }


if __name__ == '__main__':
  cli.run(main)
