"""Trains the runs of a comparison, resuming those that have started.

Any number of processes may do so in one folder, on one machine or several: each
run belongs to one of them at a time (`mhc.runtime.leases`).

    comparison.json     the panels, and what was declared before training
    PANEL/RUN/          a run, see `mhc.training.workdir`
    timing/PANEL.json   step times of its designs, see `timing`
    leases/             who trains what
"""

from collections.abc import Sequence
import json

from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.data import batches
from mhc.data import mixture
from mhc.experiments import declared
from mhc.experiments import jobs as jobs_lib
from mhc.experiments import timing
from mhc.experiments import workers
from mhc.runtime import files
from mhc.runtime import paths
from mhc.training import run
from mhc.training import workdir as workdir_lib

LEASES = 'leases'
# What a panel declares before its first run.
DECLARED = ('role', 'declared', 'margin')


def prepare(
  comparison: comparison_lib.Comparison,
  workdir: paths.Path,
  panels: Sequence[str] | None = None,
) -> jobs_lib.Jobs:
  """Checks everything, and declares the comparison in `workdir`.

  Raises:
    ValueError, OSError: invalid settings or data, a folder that holds runs with
      other settings, or other declarations; before any training.
  """
  comparison.check_panels(panels)
  jobs = jobs_lib.Jobs(comparison, workdir, panels)
  before = declared.read(workdir)
  _check_declarations(comparison, before, workdir)
  for cell in jobs.cells():
    workdir_lib.check(workdir / cell.name, cell.config)
    if not jobs.is_done(cell.name):
      batches.heldout_for(cell.config, mixture.load(cell.config))
  workdir.mkdir(parents=True, exist_ok=True)
  values = dicts.to_dict(comparison)
  for name, panel in values['panels'].items():
    first = before and before.panels.get(name)
    panel['declared_seeds'] = (
      first.declared_seeds or first.seeds if first else panel['seeds']
    )
  text = json.dumps(values, indent=2) + '\n'
  file = workdir / declared.COMPARISON
  if not file.exists() or file.read_bytes() != text.encode():
    files.replace(file, text, shared=True)
  return jobs


def train_all(
  comparison: comparison_lib.Comparison,
  workdir: paths.Path,
  deadline: float | None = None,
  panels: Sequence[str] | None = None,
  *,
  bars: bool = True,
):
  """Trains into `workdir`/PANEL/RUN until all of the runs are there.

  `deadline` is that of `run.train`; `bars` shows a progress bar for each run.

  Raises:
    ValueError, OSError: as `prepare`.
  """
  jobs = prepare(comparison, workdir, panels)
  names = jobs.names()
  todo = [name for name in names if not jobs.is_done(name)]
  print(f'{len(names)} runs in {workdir}, {len(todo)} to do', flush=True)
  width = max(map(len, names))

  def do(name):
    if name.startswith(f'{timing.TIMING}/'):
      panel = name.partition('/')[2]
      timing.write(workdir, panel, jobs.first_configs(panel))
      return
    known = jobs.names()
    number = 1 + sum(map(jobs.is_done, known))
    label = f'[{number:{len(str(len(known)))}}/{len(known)}] {name:{width}}'
    config = jobs.cell(name).config
    run.train(config, workdir / name, label if bars else None, deadline)

  workers.run_jobs(
    jobs.names,
    do,
    jobs.is_done,
    jobs.program_of,
    workdir / LEASES,
    is_complete=jobs.is_complete,
  )


def _check_declarations(comparison, before, workdir):
  """What is to be tested must not be chosen after the results are seen."""
  for name, panel in comparison.panels.items():
    old = before and before.panels.get(name)
    for what in DECLARED if old else ():
      if getattr(old, what) != getattr(panel, what):
        raise ValueError(
          f'panels.{name}: {what}={getattr(panel, what)!r}, but {workdir} was '
          f'begun with {getattr(old, what)!r}, declared before its runs: keep '
          'that, or begin another --workdir'
        )
