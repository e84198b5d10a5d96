"""Benchmarks of lm-evaluation-harness on runs' newest checkpoints, as a table.

python launch/harness.py --workdir=runs/mine --tasks=piqa,hellaswag \
  --data=benchmarks/ --out=runs/mine/benchmarks
"""

from absl import flags

from mhc.evaluation import runs
from mhc.evaluation import summary
from mhc.evaluation import tasks as tasks_lib
from mhc.runtime import cli

runs.define_flags()
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


def main():
  local = tasks_lib.prepare(TASKS.value, DATA.value, flags.FLAGS.out)
  # An extra, which at its import asks whether there is a network.
  from mhc.evaluation import harness

  def rows_of(name, scorer):
    found = harness.evaluate(scorer, TASKS.value, local, LIMIT.value)
    return summary.rows(name, found)

  runs.score(rows_of, LIMIT.value)


if __name__ == '__main__':
  cli.run(main)
