"""Being told to end: by a signal, or because the time that was given is up.

The first SIGTERM (what a preemption notice becomes on cloud machines, under
Slurm and on Kubernetes) or SIGINT (Ctrl-C) asks for a save after the step at
hand; a second one ends the process at once. Time is counted by a clock that
nobody sets.

Of many processes each is told by JAX's runtime of a SIGTERM to any of them, and
all stop after the same step. Up to there JAX takes all that come, since every
process may get one of its own; while they save, the first in a process is
answered, a second one ends it at once. SIGINT ends them at once.
"""

import os
import re
import signal
import time

from mhc.runtime import multihost

UNITS = {'': 1.0, 's': 1.0, 'm': 60.0, 'h': 3600.0}


class StopSignal:
  """While it is entered, signals ask instead of ending the process."""

  def __init__(self, deadline: float | None = None):
    """`deadline` is by `time.monotonic`."""
    self._deadline = deadline
    self._asked: signal.Signals | None = None
    self._before = {}

  def __enter__(self) -> 'StopSignal':
    if multihost.count() == 1:
      self._listen(signal.SIGTERM, signal.SIGINT)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      if handler is not None:  # not one of C++, which Python cannot put back
        signal.signal(number, handler)

  def stopping(self, step: int) -> multihost.RunStopped | None:
    """Why to save and stop after this step; the same in all processes.

    To be asked after every step.
    """
    late = self._deadline is not None and time.monotonic() > self._deadline
    if multihost.count() > 1:
      if late:
        self._deadline = None
        os.kill(os.getpid(), signal.SIGTERM)  # so that the others hear of it
      if not multihost.stopping(step):
        return None
      if not self._before:
        # In the place of JAX's handler, which all have heard by now.
        self._listen(signal.SIGTERM)
      return multihost.RunStopped('SIGTERM', step)
    if self._asked is not None:
      status = 130 if self._asked == signal.SIGINT else None
      return multihost.RunStopped(self._asked.name, step, status)
    if late:
      return multihost.RunStopped('the time is up', step)
    return None

  def _listen(self, *numbers):
    try:
      for number in numbers:
        self._before[number] = signal.signal(number, self._ask)
    except ValueError:  # not the main thread, which alone may do this
      self._before = {}

  def _ask(self, number, frame):
    del frame
    self._asked = signal.Signals(number)
    for each in self._before:
      # Not KeyboardInterrupt, which would wait for a save in progress.
      signal.signal(each, signal.SIG_DFL)
    # Not by print, which may be what was interrupted.
    os.write(
      2,
      f'\n{self._asked.name}: will save after this step and end; a second '
      'signal ends at once\n'.encode(),
    )


def seconds(text: str) -> float:
  """Of '90', '90s', '30m', '1h30m', '1.5h'.

  Raises:
    ValueError: it is none of these.
  """
  parts = re.findall(r'(\d+(?:\.\d*)?)([smh]?)', text)
  if not parts or ''.join(map(''.join, parts)) != text:
    raise ValueError(
      f'{text!r} is not a time: write 90, 90s, 30m, 1.5h or 1h30m'
    )
  total = sum(float(number) * UNITS[unit] for number, unit in parts)
  if not total:
    raise ValueError(f'{text!r} is no time to train in')
  return total
