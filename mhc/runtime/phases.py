"""What this process is doing, and for how long it has done each thing.

    with phases.phase('compiling the step'):
      ...

A phase within another interrupts its time, so that the seconds of all phases
add up to the time since the process began. Phases are those of the main thread;
other threads may look.
"""

import collections
from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
import threading
import time

STARTING = 'starting'


class Phases:
  """Seconds by phase, and the phase that goes on."""

  def __init__(self):
    self._stack = [STARTING]
    self._seconds = collections.Counter({STARTING: _process_age()})
    self._since = self._counted = time.monotonic()
    self._failed, self._error = '', None

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Does something by that name; in other threads it does not count."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    self._count()
    self._stack.append(name)
    try:
      yield
    except BaseException as error:
      if error is not self._error:
        self._failed, self._error = name, error
      raise
    finally:
      self._count()
      self._stack.remove(name)

  def progress(self):
    """Marks that the phase, though it goes on, has got somewhere."""
    self._since = time.monotonic()

  def now(self) -> tuple[str, float]:
    """What goes on, and the seconds since it began or got somewhere."""
    return self._stack[-1], time.monotonic() - self._since

  def failed(self) -> str:
    """The innermost phase that the last error ended; what goes on, if none."""
    return self._failed or self._stack[-1]

  def seconds(self) -> Mapping[str, float]:
    """The seconds of each phase until now."""
    self._count()
    return dict(self._seconds)

  def _count(self):
    now = time.monotonic()
    self._seconds[self._stack[-1]] += now - self._counted
    self._since = self._counted = now


def _process_age() -> float:
  """Seconds since this process began; 0 where the system does not tell."""
  try:
    fields = pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2]
    begun = int(fields.split()[19]) / os.sysconf('SC_CLK_TCK')
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - begun)
  except (OSError, ValueError, IndexError, AttributeError):
    return 0.0


_process = Phases()
phase, progress = _process.phase, _process.progress
now, seconds, failed = _process.now, _process.seconds, _process.failed
