"""Trains the residual designs side by side and writes a report.

python launch/compare.py                     # all runs, then the report
python launch/compare.py --report_only       # the report of finished runs
python launch/compare.py --panels=main --config.panels.main.seeds='(0,)'
"""

import pathlib

from absl import flags

from mhc.config import comparison as comparison_lib
from mhc.experiments import report
from mhc.experiments import run_all
from mhc.runtime import cli

WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/compare', 'Folder of the comparison.'
)
REPORT_ONLY = flags.DEFINE_bool(
  'report_only', False, 'Render the report of the runs that have finished.'
)
PANELS = flags.DEFINE_list(
  'panels', None, 'Panels to train and report, by name; all if not given.'
)
cli.define_config('compare.py')
cli.define_end()


def main():
  workdir = pathlib.Path(WORKDIR.value)
  if not REPORT_ONLY.value:
    comparison = cli.config(comparison_lib.Comparison).only(PANELS.value)
    run_all.train_all(comparison, workdir, cli.deadline())
  rows = report.render(workdir)
  print(report.summary(rows))
  print(f'\nreport: {workdir / "report.html"} (also report.md, results.json)')


if __name__ == '__main__':
  cli.run(main)
