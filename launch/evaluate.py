"""Held-out loss of a run's newest checkpoint, as one JSON object.

python launch/evaluate.py --workdir=runs/tiny
python launch/evaluate.py --workdir=runs/tiny --path=my_texts/ --sequences=0
"""

import json

from absl import flags

from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import evaluate

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
PATH = flags.DEFINE_string(
  'path',
  None,
  "Text to score instead of the run's own: file, folder or pattern.",
)
SEQUENCES = flags.DEFINE_integer(
  'sequences', 1024, 'Held-out rows to score; 0 for all.', lower_bound=0
)
TOKENIZER = cli.define_tokenizer()


def main():
  result = evaluate.evaluate_checkpoint(
    paths.path(WORKDIR.value), PATH.value, SEQUENCES.value, TOKENIZER.value
  )
  print(json.dumps(result))


if __name__ == '__main__':
  cli.run(main)
