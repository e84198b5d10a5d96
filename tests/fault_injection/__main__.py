"""Does a run survive? Trains tiny ones under faults and counts.

    python tests/fault_injection                      # 50 trials, minutes
    python tests/fault_injection --trials=10 --faults=killed_in_save,flipped
    python tests/fault_injection --json

Each trial is a training that something happens to, started again until it is
finished, and compared bit for bit with one that nothing happened to; see
harness.py. Folders of trials that were not survived stay for a look. A full
disk is a small tmpfs, which takes the right to mount it.
"""

import json
import pathlib
import sys
import tempfile

from absl import flags
import harness

from mhc.runtime import cli
from mhc.runtime import console

TRIALS = flags.DEFINE_integer('trials', 50, 'How many.', lower_bound=1)
SEED = flags.DEFINE_integer('seed', 0, 'Of what happens when.')
FAULTS = flags.DEFINE_list(
  'faults', None, f'Some of {", ".join(harness.FAULTS)}; all by default.'
)
JOBS = flags.DEFINE_integer('jobs', 2, 'Trials at a time.', lower_bound=1)
WORKDIR = flags.DEFINE_string('workdir', None, 'Default: a temporary folder.')
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main():
  names = tuple(FAULTS.value or harness.FAULTS)
  for name in names:
    if name not in harness.FAULTS:
      raise ValueError(
        f'--faults={name}: must be some of {", ".join(harness.FAULTS)}'
      )
  root = pathlib.Path(WORKDIR.value or tempfile.mkdtemp(prefix='torture-'))
  counts = {name: [0, 0] for name in names}
  with console.progress_bar(TRIALS.value, 0, 'torture') as bar:
    for trial in harness.trials(
      root, TRIALS.value, SEED.value, names, JOBS.value
    ):
      counts[trial.fault][0] += trial.survived
      counts[trial.fault][1] += 1
      verdict = 'survived' if trial.survived else 'LOST'
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
    print(f'what was lost is in {root}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  cli.run(main)
