"""Trains the runs of a comparison in turn, resuming those that have started."""

import json
import pathlib

from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.data import batches
from mhc.runtime import files
from mhc.training import run
from mhc.training import workdir as workdir_lib


def train_all(
  comparison: comparison_lib.Comparison,
  workdir: pathlib.Path,
  deadline: float | None = None,
):
  """Trains into `workdir`/PANEL/RUN and writes comparison.json.

  `deadline` is that of `run.train`.

  Raises:
    ValueError, OSError: invalid settings or data, or a folder that holds runs
      with other settings; before any training.
  """
  runs = {
    name: config
    for panel in comparison.panels
    for name, config in comparison.runs(panel).items()
  }
  for name, config in runs.items():
    workdir_lib.check(workdir / name, config)
    batches.heldout_for(config, batches.load_for(config))
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dicts.to_dict(comparison), indent=2) + '\n'
  files.replace(workdir / 'comparison.json', text)

  todo = [
    name for name in runs if workdir_lib.read_summary(workdir / name) is None
  ]
  print(f'{len(runs)} runs in {workdir}, {len(todo)} to do', flush=True)
  width = max(map(len, runs))
  for number, name in enumerate(todo, start=1):
    label = f'[{number:{len(str(len(todo)))}}/{len(todo)}] {name:{width}}'
    run.train(runs[name], workdir / name, label, deadline)
