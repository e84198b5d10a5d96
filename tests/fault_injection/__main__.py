"""Injects faults into small training runs and counts those that survive.

    python tests/fault_injection                      # 50 trials, minutes
    python tests/fault_injection --trials=10 --faults=killed_in_save,flipped
    python tests/fault_injection --json

Each trial is a run with one fault, restarted until it is finished, and compared
bit for bit with an undisturbed one; see harness.py. Folders of failed trials
are kept. A full disk is a small tmpfs, which requires the right to mount it.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags
import harness

from mhc.runtime import cli
from mhc.runtime import console

TRIALS = flags.DEFINE_integer('trials', 50, 'Number of trials.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the fault schedule.')
FAULTS = flags.DEFINE_list(
  'faults',
  None,
  f'Faults to inject, of {", ".join(harness.FAULTS)}; by default all.',
)
JOBS = flags.DEFINE_integer('jobs', 2, 'Parallel trials.', lower_bound=1)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the trials; by default a temporary one.'
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main():
  names = tuple(FAULTS.value or harness.FAULTS)
  for name in names:
    if name not in harness.FAULTS:
      raise ValueError(
        f'--faults={name} is unknown: choose from {", ".join(harness.FAULTS)}'
      )
  root = pathlib.Path(WORKDIR.value or tempfile.mkdtemp(prefix='faults-'))
  counts = {name: [0, 0] for name in names}
  with console.progress_bar(TRIALS.value, 0, 'trials') as bar:
    for trial in harness.trials(
      root, TRIALS.value, SEED.value, names, JOBS.value
    ):
      counts[trial.fault][0] += trial.survived
      counts[trial.fault][1] += 1
      verdict = 'survived' if trial.survived else 'FAILED'
      console.print_line(
        f'{trial.number:3} {trial.fault:16} {verdict} ({trial.seconds:.0f} s): '
        f'{trial.said}'
      )
      bar.update()
  survived, tried = map(sum, zip(*counts.values(), strict=True))
  if JSON.value:
    by_fault = {
      name: {'survived': good, 'tried': number}
      for name, (good, number) in counts.items()
    }
    result = {'survived': survived, 'tried': tried, 'by_fault': by_fault}
    print(json.dumps(result))
  else:
    print('| fault | survived | tried | what happens |\n|---|---:|---:|---|')
    for name, (good, number) in counts.items():
      what = harness.FAULTS[name].__doc__.strip().rstrip('.')
      print(f'| {name} | {good} | {number} | {what} |')
    print(f'| all | {survived} | {tried} | |')
  if survived < tried:
    print(f'the failed trials are in {root}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main)
