"""Preemption: a run that trains asks whether it should save and stop.

It should on a signal (`mhc.runtime.signals`) or at a deadline, which is by a
monotonic clock.

With several processes, JAX's runtime notifies each of a SIGTERM to any of them,
and all stop after the same step. Until then JAX handles every SIGTERM, since
each process may receive one of its own; SIGHUP becomes one. While they save,
signals are handled as those of a process alone. SIGINT ends them at once.
"""

import contextlib
import os
import re
import signal
import time

from mhc.runtime import multihost
from mhc.runtime import signals

UNITS = {'': 1.0, 's': 1.0, 'm': 60.0, 'h': 3600.0}


class StopSignal:
  """A context in which a run that trains asks whether it should stop."""

  def __init__(self, deadline: float | None = None):
    """`deadline` is a time of `time.monotonic`."""
    self._deadline = deadline
    self._own = contextlib.ExitStack()
    self._handlers = None

  def __enter__(self) -> 'StopSignal':
    if multihost.count() == 1:
      self._handle()
    return self

  def __exit__(self, *_):
    if self._handlers is not None:
      self._handlers.saves = False
    self._own.close()

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
      if self._handlers is None:
        # Replaces JAX's handler, which has notified all by now.
        self._handle()
        if self._handlers is not None:
          self._handlers.take(signal.SIGTERM)
      return multihost.RunStopped('SIGTERM', step)
    received = self._handlers and self._handlers.received
    if received:
      status = 130 if received == signal.SIGINT else None
      return multihost.RunStopped(received.name, step, status)
    if late:
      return multihost.RunStopped('the time is up', step)
    return None

  def _handle(self):
    if signals.Handlers.current() is None:
      self._own.enter_context(signals.Handlers(processes=multihost.count))
    self._handlers = signals.Handlers.current()
    if self._handlers is not None:  # only the main thread may have them
      self._handlers.saves = True


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
