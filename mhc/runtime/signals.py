"""Signals as requests: to save and stop, or to end where nothing is to save.

SIGTERM (what a preemption notice becomes on cloud machines, under Slurm and on
Kubernetes), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) are requests:

* while a run trains, for a checkpoint after the current step;
* where there is nothing to save (data is read, a program compiled, the next run
  of a comparison is due), for the end.

Supervisors repeat themselves: signals within a second of the first are the same
request. A later one ends the process at once. What the process was started to
ignore, as by nohup, stays ignored.
"""

from collections.abc import Callable
import contextlib
import os
import signal
import socket
import threading
import time

REQUESTS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
# Signals that follow the first one within these seconds repeat it.
SAME_S = 1.0
# Python runs handlers between two of its instructions. A compilation is one.
STUCK_S = 2.0


class Ended(KeyboardInterrupt):
  """A signal asked for the end when there was nothing to save."""

  def __init__(self, number: signal.Signals):
    super().__init__(number.name)
    self.number = number


class Handlers:
  """A context in which signals are requests, see above.

  The main thread enters it; in another one it does nothing, as within another
  of its kind.

  Args:
    status: exit status of a process that is ended where Python cannot raise
      `Ended`; None for 128 + the signal's number.
    processes: the number of those that train together, by now.
  """

  _current: 'Handlers | None' = None

  def __init__(
    self,
    status: int | None = None,
    processes: Callable[[], int] = lambda: 1,
  ):
    self._status, self._processes = status, processes
    self._replaced = {}
    self._first: tuple[signal.Signals, float] | None = None
    self._is_raised = False
    self.saves = False  # whether a run asks `received` after every step

  def __enter__(self) -> 'Handlers':
    main = threading.current_thread() is threading.main_thread()
    if Handlers._current is None and main:
      Handlers._current = self
      self._wake, wake = socket.socketpair()
      wake.setblocking(False)
      self._woken = signal.set_wakeup_fd(
        wake.fileno(), warn_on_full_buffer=False
      )
      self._closed_last = wake
      threading.Thread(target=self._watch, daemon=True).start()
      for number in heeded():
        self.take(number)
    return self

  def __exit__(self, *_):
    if Handlers._current is not self:
      return
    for number, handler in self._replaced.items():
      if handler is not None:  # not one of C++, which Python cannot restore
        signal.signal(number, handler)
    signal.set_wakeup_fd(self._woken)
    self._closed_last.close()
    Handlers._current = None

  @staticmethod
  def current() -> 'Handlers | None':
    return Handlers._current

  def take(self, number: signal.Signals):
    """Handles a signal from now on, whatever has handled it before."""
    before = signal.signal(number, self._on_signal)
    if before != self._on_signal:
      self._replaced.setdefault(number, before)

  @property
  def received(self) -> signal.Signals | None:
    """The signal that asks for a stop; None for none."""
    return self._first and self._first[0]

  def check(self):
    """Raises `Ended` if a signal has asked for the end."""
    if self._first is not None:
      raise Ended(self._first[0])

  def _on_signal(self, number, frame):
    del frame
    number, now = signal.Signals(number), time.monotonic()
    if self._first is None:
      if self._processes() > 1 and number == signal.SIGHUP:
        os.kill(os.getpid(), signal.SIGTERM)  # which notifies the others
        return
      if self._processes() > 1 and number == signal.SIGINT:
        raise KeyboardInterrupt
      self._first = number, now
      if not self.saves:
        self._is_raised = True
        raise Ended(number)
      # Not by print, which may be what was interrupted.
      _say(
        f'\n{number.name}: will save after this step and end; another signal, '
        f'after {SAME_S:g} s, ends at once\n'
      )
    elif now - self._first[1] > SAME_S:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)

  def _watch(self):
    """Ends the process where the main thread cannot handle a signal."""
    first = None
    while data := self._wake.recv(1):
      number = data[0]
      # Of all signals of the process, those that are handled here.
      if number not in REQUESTS or signal.getsignal(number) != self._on_signal:
        continue
      late = first is not None and time.monotonic() - first > SAME_S
      first = first or time.monotonic()
      if late or not self.saves:
        threading.Thread(
          target=self._end_if_stuck, args=(number, late), daemon=True
        ).start()
    self._wake.close()

  def _end_if_stuck(self, number, late):
    time.sleep(STUCK_S)
    if Handlers._current is not self or self._is_raised:
      return
    if self.saves and not late:
      return
    _say(f'\n{signal.Signals(number).name}: ends at once\n')
    asked = number != signal.SIGINT and not late and self._status is not None
    os._exit(self._status if asked else 128 + number)


def heeded() -> list[signal.Signals]:
  """The requests that this process was not started to ignore."""
  return [n for n in REQUESTS if signal.getsignal(n) != signal.SIG_IGN]


def check():
  """Raises `Ended` if a signal has asked for the end, before work begins."""
  if Handlers.current():
    Handlers.current().check()


def _say(text):
  with contextlib.suppress(OSError):
    os.write(2, text.encode())
