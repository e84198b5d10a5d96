"""One progress bar for the runs of several workers, read from their files."""

import threading

from mhc.experiments import jobs as jobs_lib
from mhc.runtime import console
from mhc.runtime import paths
from mhc.training import workdir as workdir_lib

# Seconds between looks, for a bar that replaces itself and for a log.
POLL_S, LOG_S = 2.0, 30.0


class Progress:
  """A context in which a thread shows how far the runs of `jobs` are.

  A run counts by its tokens times its blocks, roughly its time.
  """

  def __init__(self, jobs: jobs_lib.Jobs):
    self._jobs, self._ended = jobs, threading.Event()
    self._bar = console.share_bar()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self):
    # The time left follows from what this context sees done, not from what an
    # earlier one left.
    self._bar.initial = self._show()
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join()
    self._show()
    self._bar.close()

  def _run(self):
    while not self._ended.wait(POLL_S if console.is_live() else LOG_S):
      self._show()

  def _show(self) -> float:
    done, whole, finished, runs = share(self._jobs)
    self._bar.n = min(1.0, done / whole) if whole else 0.0
    self._bar.set_description_str(f'{finished} of {runs} runs', refresh=False)
    self._bar.refresh()
    return self._bar.n


def share(jobs: jobs_lib.Jobs) -> tuple[float, float, int, int]:
  """(work done, all work, finished runs, runs)."""
  done, whole, finished = 0.0, 0.0, 0
  cells = jobs.cells()
  for cell in cells:
    config, folder = cell.config, jobs.workdir / cell.name
    work = config.tokens_per_step * config.model.num_blocks * config.num_steps
    whole += work
    if jobs.is_done(cell.name):
      done, finished = done + work, finished + 1
    else:
      steps = _lines(folder / workdir_lib.METRICS)
      done += work * min(1, steps / config.num_steps)
  return done, whole, finished, len(cells)


def _lines(path: paths.Path) -> int:
  try:
    return path.read_bytes().count(b'\n')
  except OSError:
    return 0
