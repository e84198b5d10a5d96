"""The main job: trains the residual designs side by side and reports.

python launch/compare.py                     # all runs, then the report
python launch/compare.py --report_only       # the report of finished runs
python launch/compare.py --config.panels.main.seeds='(0,)'
"""

import pathlib

from absl import flags

import command_line
from mhc.config import comparison as comparison_lib
from mhc.experiments import report
from mhc.experiments import run_all

WORKDIR = flags.DEFINE_string(
  'workdir', 'runs/compare', 'Folder of the comparison.'
)
REPORT_ONLY = flags.DEFINE_bool(
  'report_only', False, 'Render the report of the runs that have finished.'
)
command_line.define_config('compare.py')
command_line.define_end()


def main():
  workdir = pathlib.Path(WORKDIR.value)
  if not REPORT_ONLY.value:
    comparison = command_line.config(comparison_lib.Comparison)
    run_all.train_all(comparison, workdir, command_line.deadline())
  rows = report.render(workdir)
  print(report.summary(rows))
  print(f'\nreport: {workdir / "report.html"} (also report.md, results.json)')


if __name__ == '__main__':
  command_line.run(main)
