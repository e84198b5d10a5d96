"""What a run's newest model uses of its streams: its loss with parts replaced.

python launch/dissect.py --workdir=runs/tiny
python launch/dissect.py --workdir=runs/tiny --rows=1024 --json

`mhc/training/dissect.py` says what is replaced. Differences are in nats a token
to the model as trained, with their standard error over held-out rows; + is
worse.
"""

import json

from absl import flags

from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import dissect

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
ROWS = flags.DEFINE_integer(
  'rows', 256, 'Held-out rows to score.', lower_bound=2
)
JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main():
  found = dissect.dissect_checkpoint(paths.path(WORKDIR.value), ROWS.value)
  if JSON.value:
    print(json.dumps(found))
    return
  print(
    f'{WORKDIR.value}: {found["kind"]} after {found["step"]} updates, '
    f'{found["rows"]} rows of {found["corpus"]}\n\n'
    '| | nats a token | difference | standard error |\n|---|---:|---:|---:|'
  )
  for row in found['interventions']:
    print(f'| {row["name"]} | {row["nats"]:.4f} | {_difference(row)} |')


def _difference(row):
  if 'difference' not in row:
    return '|'
  error = row['standard_error']
  shown = 'unknown' if error is None else f'{error:.6f}'
  return f'{row["difference"]:+.6f} | {shown}'


if __name__ == '__main__':
  cli.run(main)
