"""Benchmarks of lm-evaluation-harness on runs' newest checkpoints, as a table.

python launch/harness.py --workdir=runs/mine --tasks=piqa,hellaswag \
  --data=benchmarks/ --out=runs/mine/benchmarks
"""

from absl import flags

from mhc.evaluation import scoring
from mhc.evaluation import summary
from mhc.evaluation import tasks as tasks_lib
from mhc.runtime import cli
from mhc.runtime import paths

WORKDIR = flags.DEFINE_list(
  'workdir', None, 'Folders of the runs, separated by commas.', required=True
)
TASKS = flags.DEFINE_list(
  'tasks', list(tasks_lib.BENCHMARKS), 'Tasks of lm_eval, separated by commas.'
)
DATA = flags.DEFINE_string(
  'data',
  None,
  'Folder of the files of tasks, read in place of the Hugging Face hub.',
)
LIMIT = flags.DEFINE_integer(
  'limit', None, 'Documents a task; all by default.', lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 16, 'Rows that are computed at once.', lower_bound=1
)
OUT = flags.DEFINE_string(
  'out', None, 'Folder for results.json and table.md.', required=True
)
TOKENIZER = cli.define_tokenizer()


def main():
  local = tasks_lib.prepare(TASKS.value, DATA.value, OUT.value)
  # An extra, which at its import asks whether there is a network.
  from mhc.evaluation import harness

  rows, records = [], {}
  for name in WORKDIR.value:
    workdir = paths.path(name)
    scorer = scoring.of_run(workdir, TOKENIZER.value, BATCH_SIZE.value)
    found = harness.evaluate(scorer, TASKS.value, local, LIMIT.value)
    rows += summary.rows(name, found)
    records[name] = scorer.record()
  summary.write(paths.path(OUT.value), rows, records, LIMIT.value)
  print(summary.markdown(rows, records))


if __name__ == '__main__':
  cli.run(main)
