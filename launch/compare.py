"""Trains the residual designs side by side and writes a report.

python launch/compare.py                     # all runs, then the report
python launch/compare.py --list              # what it takes and could see
python launch/compare.py --workers=2         # two processes share the cores
python launch/compare.py --report_only       # the report of finished runs
python launch/compare.py --panels=main --config.panels.main.seeds='(0,1,2,3)'

The same command on other machines with the same --workdir shares the work.
"""

import os
import sys

from absl import flags
import jax

from mhc.config import comparison as comparison_lib
from mhc.config import given
from mhc.experiments import jobs as jobs_lib
from mhc.experiments import plan
from mhc.experiments import progress
from mhc.experiments import report
from mhc.experiments import run_all
from mhc.experiments import workers
from mhc.runtime import cli
from mhc.runtime import paths
from mhc.runtime import shadow

WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/compare', 'Folder of the comparison.'
)
REPORT_ONLY = flags.DEFINE_bool(
  'report_only', False, 'Render the report of the runs that have finished.'
)
PANELS = flags.DEFINE_list(
  'panels', None, 'Panels to train, by name; all if not given.'
)
LIST = flags.DEFINE_bool(
  'list', False, 'Print runs, minutes and resolution; train nothing.'
)
WORKERS = flags.DEFINE_integer(
  'workers',
  1,
  'Processes that share the runs, each with its share of the cores, or of the '
  'GPUs and their memory; 0 for one a core or GPU.',
  lower_bound=0,
)
WORKER = flags.DEFINE_bool(
  'worker', False, 'Train quietly and write no report: one of --workers.'
)
BUDGET = flags.DEFINE_float(
  'budget_hours', None, 'Refuse to begin what is predicted to take longer.'
)
cli.define_config('compare')
cli.define_end()


def main():
  workdir = paths.path(WORKDIR.value)
  if not REPORT_ONLY.value:
    _share_programs(workdir)
    comparison = cli.config(comparison_lib.Comparison)
    comparison.check_panels(PANELS.value)
    lines = given.check(comparison, sys.argv, PANELS.value)
    if lines and not WORKER.value:
      print('\n'.join(lines))
    if (LIST.value or BUDGET.value) and not WORKER.value:
      _plan(comparison, workdir)
    if LIST.value:
      return
    _train(comparison, workdir)
    if WORKER.value:
      return
  found = report.render(workdir, keep=not REPORT_ONLY.value)
  print(report.summary(found))
  print(
    f'\nreport: {workdir / "report.html"} (also report.md, results.json, '
    'results.csv, figures/)'
  )


def _train(comparison, workdir):
  number = WORKERS.value or workers.most()
  deadline = cli.deadline()
  if number == 1 or WORKER.value:
    run_all.train_all(
      comparison, workdir, deadline, PANELS.value, bars=not WORKER.value
    )
    return
  jobs = run_all.prepare(comparison, workdir, PANELS.value)
  if jobs.is_finished():
    return
  with progress.Progress(jobs):
    statuses = workers.start_local(number, sys.argv)
  if not jobs.is_finished():
    cli.end_with_workers(statuses)


def _plan(comparison, workdir):
  jobs = jobs_lib.Jobs(comparison, workdir, PANELS.value)
  # More of them take turns: counted as if that gained nothing.
  number = min(WORKERS.value or workers.most(), workers.most())
  # Before anything has started JAX's threads: they are timed as a worker's.
  with workers.share_of_cores(0, number):
    speed = plan.calibrate(jobs)
  lines = plan.predict(jobs, speed)
  print(plan.describe(jobs, lines, number))
  hours = sum(line.seconds for line in lines) / 3600 / number
  if BUDGET.value and hours > BUDGET.value:
    raise ValueError(
      f'--budget_hours={BUDGET.value:g}: the comparison is predicted to take '
      f'{hours:.1f} hours; leave out panels or seeds, or give more workers'
    )


def _share_programs(workdir):
  """Lets the processes of this machine compile each program once."""
  cache = shadow.place(workdir / 'programs') / os.uname().nodename
  jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  cli.run(main)
