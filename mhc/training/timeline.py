"""Where the time of a run went, over all of its starts.

timeline.jsonl has a line at every start, saved state, rollback and end, which
no restart takes back:

    time      seconds since 1970
    what      'start', 'saved', 'rollback', 'stopped' or 'end'
    lost      steps whose work this start or rollback has thrown away
    lost_s    the seconds that they had taken
    counted_s those of them that an earlier line counts as training
    seconds   of this start until now, by phase (`mhc.runtime.phases`)

Goodput is the share of the time since the first start that trained steps which
still count. The rest is told by cause.
"""

from collections.abc import Mapping, Sequence
import time
from typing import Any

from mhc.runtime import console
from mhc.runtime import json_lines
from mhc.runtime import paths
from mhc.runtime import phases

FILE = 'timeline.jsonl'
TRAINING = 'training'


_before: dict[str, float] | None = None  # the seconds when a run began


def begin():
  """A run begins in this process: the first one from the process's start."""
  global _before
  is_first = _before is None and not console.in_notebook()
  _before = {} if is_first else dict(phases.seconds())


class Timeline:
  """The timeline of a run that starts, or goes on; one process writes it."""

  def __init__(self, workdir: paths.Path):
    known = json_lines.read_lines(workdir / FILE)
    self._told = known[-1]['step'] if known else 0
    self._file = json_lines.JsonLines(workdir / FILE, last_step=2**62)
    self._before = _before or {}

  def mark(self, what: str, step: int, lost: Sequence[Mapping] = ()):
    """Adds a line; `lost` are the metrics of steps that no longer count."""
    now = phases.seconds()
    spent = {name: now[name] - self._before.get(name, 0.0) for name in now}
    # What a process did after its last line is counted nowhere.
    told = (
      lost
      if what == 'rollback'
      else [line for line in lost if line['step'] <= self._told]
    )
    values = {
      'time': time.time(),
      'what': what,
      'lost': len(lost),
      'lost_s': _seconds(lost),
      'counted_s': _seconds(told),
      'seconds': {name: round(s, 3) for name, s in spent.items() if s},
    }
    self._file.write(step, values)
    self._told = step

  def save(self):
    self._file.save()

  def close(self):
    self._file.close()


def _seconds(lines) -> float:
  return sum((line.get('time/step_s') or 0.0 for line in lines), 0.0)


def goodput(workdir: paths.Path) -> dict[str, Any] | None:
  """Where the time of the run in `workdir` went; None if it has no timeline.

  Returns:
    'share' of the time since the first start, 'wall_s', that trained what
    counts; 'starts', 'lost_steps' and 'lost_s' by 'start' (after a kill) and
    'rollback'; 'seconds' by phase, with those 'unknown' in which no process
    ran, or one that was killed had not said what it did.
  """
  lines = json_lines.read_lines(workdir / FILE)
  if not lines:
    return None
  spent, starts = {}, [[]]
  for line in lines:
    if line['what'] == 'start' and starts[-1]:
      starts.append([])
    starts[-1].append(line)
  for start in starts:
    for name, seconds in start[-1]['seconds'].items():
      spent[name] = spent.get(name, 0.0) + seconds
  wall = (
    lines[-1]['time'] - lines[0]['time'] + sum(lines[0]['seconds'].values())
  )
  lost = {
    cause: [line for line in lines if line['what'] == cause]
    for cause in ('start', 'rollback')
  }
  lost_s = {
    cause: sum(line['lost_s'] for line in some) for cause, some in lost.items()
  }
  spent['unknown'] = max(0.0, wall - sum(spent.values()))
  counted = sum(line['counted_s'] for line in lines)
  trained = max(0.0, spent.get(TRAINING, 0.0) - counted)
  return {
    'share': min(1.0, trained / wall) if wall > 0 else 0.0,
    'wall_s': wall,
    'starts': len(starts),
    'lost_steps': {
      cause: sum(line['lost'] for line in some) for cause, some in lost.items()
    },
    'lost_s': lost_s,
    'seconds': spent,
  }
