"""Processes of this machine: work spread over them, commands tied to it."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import process
import multiprocessing
from multiprocessing import connection
import os
import signal
import sys
import threading

# Becomes the command, which gets SIGTERM when its parent ends, even by SIGKILL.
# Not by subprocess's preexec_fn, which may deadlock beside JAX's threads.
_TIED = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
try:
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
except (OSError, AttributeError):
  pass  # not Linux
if os.getppid() != int(parent):
  sys.exit(128 + signal.SIGTERM)
os.execv(command[0], command)
"""


def tied(command: Sequence[str]) -> list[str]:
  """The command, to be told by SIGTERM when this process ends (on Linux).

  It is to be started by this process itself, and from the main thread: Linux
  means the end of the thread.
  """
  return [sys.executable, '-Sc', _TIED, str(os.getpid()), *command]


def num_cores() -> int:
  """Cores that this process may use; all of them where the system is mute."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def ordered_map[A, B](
  function: Callable[[A], B], items: Iterable[A], workers: int
) -> Iterator[B]:
  """`map(function, items)` in `workers` processes, in this one if it is one.

  Results come in order; `items` is read no further than one more than there
  are workers, so that memory is bounded. The processes end with this one, even
  if it is killed. `function` and what it takes and returns are pickled.

  Raises:
    OSError: a process was killed.
  """
  if workers == 1:
    yield from map(function, items)
    return
  # Not a fork of this process, which may have threads.
  context = multiprocessing.get_context('forkserver')
  others = set(multiprocessing.active_children())
  pool = futures.ProcessPoolExecutor(workers, context, _end_with_parent)
  waiting = collections.deque()
  try:
    for item in items:
      waiting.append(pool.submit(function, item))
      if len(waiting) > workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
    pool.shutdown()
  except process.BrokenProcessPool:
    raise OSError(
      f'one of {workers} processes was killed, perhaps for want of memory: '
      'take fewer (--workers)'
    ) from None
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for child in set(multiprocessing.active_children()) - others:
      child.terminate()


def _end_with_parent():
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what to do
  parent = multiprocessing.parent_process()

  def watch():
    connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
