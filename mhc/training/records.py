"""What a run writes beside its states: metrics, probes, events, and copies.

Lines of metrics and probes of steps that were rolled back, or repeated after a
kill, are dropped; those of events are kept. The first of several processes
writes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mhc import config as config_lib
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.runtime.json_lines import JsonLines
from mhc.runtime.json_lines import read_lines
from mhc.training import tensorboard
from mhc.training import timeline
from mhc.training import wandb
from mhc.training import workdir as workdir_lib

FILES = {
  'metrics': workdir_lib.METRICS,
  'probes': workdir_lib.PROBES,
  'events': workdir_lib.EVENTS,
}


class Records:
  """The records of one run, written by its first process."""

  def __init__(self, config: config_lib.Config, workdir: paths.Path):
    self._config, self._workdir = config, workdir
    self._files: dict[str, JsonLines] = {}
    self._timeline = None
    self._copies = []
    self._early = []  # events from before their file is open

  def open(self, step: int, positions: Mapping[str, Any] | None):
    """Goes on after `step`, the first time or after a rollback.

    Args:
      step: of the state that was restored, 0 for a new one.
      positions: what `positions` returned when it was saved; None if unknown.
    """
    if not multihost.is_first():
      return
    first = 'events' not in self._files
    names = ('metrics', 'probes', *(('events',) if first else ()))
    if first and not step and positions is None:
      self._keep_earlier()
    for name in names:
      if name in self._files:
        self._files[name].close()
      self._files[name] = JsonLines(
        self._workdir / FILES[name], step, (positions or {}).get(name)
      )
    if first:
      self._timeline = timeline.Timeline(self._workdir)
    what = 'start' if first else 'rollback'
    self.mark(what, step, self._files['metrics'].dropped)
    for copy in self._copies:
      copy.close()
    self._copies = []
    if self._config.tensorboard:
      folder = self._workdir / workdir_lib.TENSORBOARD
      self._copies.append(tensorboard.TensorBoard(folder, step))
    if self._config.wandb:
      self._copies.append(wandb.WandB(self._config, self._workdir))
    early, self._early = self._early, []
    for at, values in early:
      self.event(at, **values)
    for name in names:
      if damage := self._files[name].damage:
        self.event(step, guard='records', metric=damage, policy='log')

  def _keep_earlier(self):
    """Sets aside records of steps whose states are gone, and says so."""
    path = self._workdir / workdir_lib.METRICS
    last = max((line['step'] for line in read_lines(path)), default=0)
    if last < max(1, self._config.checkpoint_every):
      return  # none had been saved yet
    kept = [
      files.set_aside(self._workdir / name).name
      for name in FILES.values()
      if (self._workdir / name).exists()
    ]
    console.print_line(
      f'NO STATE: {path} shows step {last}, but {self._workdir} has no '
      'checkpoint: the run begins again at step 0. Its earlier records are '
      f'kept as {", ".join(kept)}.'
    )

  def metrics(self, step: int, values: Mapping[str, float]):
    if 'metrics' in self._files:
      self._files['metrics'].write(step, values)
    for copy in self._copies:
      copy.write(step, values)

  def probe(self, step: int, profile: Mapping[str, Any]):
    if 'probes' in self._files:
      self._files['probes'].write(step, profile)

  def event(self, step: int, **values):
    if 'events' in self._files:
      self._files['events'].write(step, values)
    elif multihost.is_first():
      self._early.append((step, values))

  def mark(self, what: str, step: int, lost: Sequence[Mapping] = ()):
    """Adds a line to the timeline, see `Timeline.mark`."""
    if self._timeline is not None:
      self._timeline.mark(what, step, lost)

  def positions(self) -> dict[str, Any]:
    """What has been written, for a checkpoint, once it is saved."""
    own = () if self._timeline is None else (self._timeline,)
    for sink in (*self._copies, *own):
      sink.save()
    return {name: file.position() for name, file in self._files.items()}

  def close(self):
    own = () if self._timeline is None else (self._timeline,)
    for sink in (*self._files.values(), *self._copies, *own):
      sink.close()
