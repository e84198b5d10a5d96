"""A thread that says where a process is stuck."""

import faulthandler
import tempfile
import threading

from mhc.runtime import console
from mhc.runtime import phases

# A phase may take this many times the longest that one of its name has taken.
FACTOR = 10.0
POLLS = 20  # in `limit_s`


class Watchdog:
  """A context in which nothing may take longer than it ever should.

  If a phase makes no progress for `limit_s` seconds, and for ten times as long
  as any before under its name, its name and the stacks of all threads are
  printed; then again after twice the time. Phases of `patient` never are. The
  process goes on: a file system may answer yet.
  """

  def __init__(self, limit_s: float, patient: frozenset[str] = frozenset()):
    """`limit_s` 0 for no watchdog."""
    self._limit, self._patient = limit_s, patient
    self._longest: dict[str, float] = {}
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self._limit:
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    if self._limit:
      self._thread.join()

  def _run(self):
    told, last = 0.0, ('', 0.0)
    while not self._ended.wait(self._limit / POLLS):
      name, seconds = phases.now()
      if name != last[0] or seconds < last[1]:  # it has got somewhere
        before = self._longest.get(last[0], 0.0)
        self._longest[last[0]] = max(before, last[1])
        told = 0.0
      last = name, seconds
      limit = max(self._limit, FACTOR * self._longest.get(name, 0.0), 2 * told)
      if seconds > limit and name not in self._patient:
        told = seconds
        console.print_line(
          f'STUCK: {name} has got nowhere for {seconds:.0f} s '
          f'(watchdog_s={self._limit:g}). The stacks of all threads:\n'
          + stacks()
        )


def stacks() -> str:
  """The stack of every thread, the innermost call first."""
  with tempfile.TemporaryFile() as file:
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    return file.read().decode(errors='replace')
