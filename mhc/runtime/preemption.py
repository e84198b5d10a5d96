"""Preemption: a checkpoint and a stop on a signal, or at a deadline.

The first SIGTERM (what a preemption notice becomes on cloud machines, under
Slurm and on Kubernetes) or SIGINT (Ctrl-C) requests a checkpoint after the
current step; a second one ends the process at once. The deadline is by a
monotonic clock.

With several processes, JAX's runtime notifies each of a SIGTERM to any of them,
and all stop after the same step. Until then JAX handles every SIGTERM, since
each process may receive one of its own; while they save, the first in a
process is logged, a second one ends it at once. SIGINT ends them at once.
"""

import os
import re
import signal
import time

from mhc.runtime import multihost

UNITS = {'': 1.0, 's': 1.0, 'm': 60.0, 'h': 3600.0}


class StopSignal:
  """A context in which signals request a stop instead of ending the process."""

  def __init__(self, deadline: float | None = None):
    """`deadline` is a time of `time.monotonic`."""
    self._deadline = deadline
    self._received: signal.Signals | None = None
    self._replaced = {}

  def __enter__(self) -> 'StopSignal':
    if multihost.count() == 1:
      self._handle(signal.SIGTERM, signal.SIGINT)
    return self

  def __exit__(self, *_):
    for number, handler in self._replaced.items():
      if handler is not None:  # not one of C++, which Python cannot restore
        signal.signal(number, handler)

  def stopping(self, step: int) -> multihost.RunStopped | None:
    """Returns why to save and stop after this step; None to go on.

    The same in all processes. To be called after every step.
    """
    late = self._deadline is not None and time.monotonic() > self._deadline
    if multihost.count() > 1:
      if late:
        self._deadline = None
        os.kill(os.getpid(), signal.SIGTERM)  # which notifies the others
      if not multihost.stopping(step):
        return None
      if not self._replaced:
        # Replaces JAX's handler, which has notified all by now.
        self._handle(signal.SIGTERM)
      return multihost.RunStopped('SIGTERM', step)
    if self._received is not None:
      status = 130 if self._received == signal.SIGINT else None
      return multihost.RunStopped(self._received.name, step, status)
    if late:
      return multihost.RunStopped('the time is up', step)
    return None

  def _handle(self, *numbers):
    try:
      for number in numbers:
        self._replaced[number] = signal.signal(number, self._on_signal)
    except ValueError:  # only the main thread may do this
      self._replaced = {}

  def _on_signal(self, number, frame):
    del frame
    self._received = signal.Signals(number)
    for each in self._replaced:
      # Not KeyboardInterrupt, which would wait for a save in progress.
      signal.signal(each, signal.SIG_DFL)
    # Not by print, which may be what was interrupted.
    os.write(
      2,
      f'\n{self._received.name}: will save after this step and end; a second '
      'signal ends at once\n'.encode(),
    )


def seconds(text: str) -> float:
  """Parses a duration such as '90', '90s', '30m', '1h30m' or '1.5h'.

  Raises:
    ValueError: it is not one, or 0.
  """
  parts = re.findall(r'(\d+(?:\.\d*)?)([smh]?)', text)
  if not parts or ''.join(map(''.join, parts)) != text:
    raise ValueError(
      f'{text!r} is not a time: write 90, 90s, 30m, 1.5h or 1h30m'
    )
  total = sum(float(number) * UNITS[unit] for number, unit in parts)
  if not total:
    raise ValueError(f'{text!r} is a time of 0 s: write a longer one')
  return total
