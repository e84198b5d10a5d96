"""Event loops that, when closed, first wait for their running tasks.

Orbax reads and writes the arrays of a state concurrently, in an asyncio loop
that it closes as soon as one of them fails (`asyncio_utils.run_sync` of
orbax-checkpoint 0.12.8). TensorStore's threads then report the others to a loop
that is closed: tracebacks on the terminal and, once, a crash of the
interpreter. This module can go when Orbax waits for its tasks itself: then
`test_orbax_alone_closes_its_loop_early` fails.
"""

import asyncio
from collections.abc import Callable
from concurrent import futures
import contextlib
from typing import Any

from orbax.checkpoint._src import asyncio_utils

# Longer than the rest of a read takes; a read that hangs is abandoned.
SECONDS = 60


class DrainingEventLoop(asyncio.SelectorEventLoop):
  """Waits for its tasks when it is closed, and ignores their errors."""

  def __init__(self):
    super().__init__()
    self._begun = set()
    self.set_task_factory(self._task)

  def _task(self, loop, coroutine, **options):
    task = asyncio.Task(coroutine, loop=loop, **options)
    self._begun.add(task)
    task.add_done_callback(self._begun.discard)
    return task

  def close(self):
    if not self.is_closed() and not self.is_running():
      # The first error has been raised; the others follow from it.
      self.set_exception_handler(lambda loop, context: None)
      if self._begun:
        last = asyncio.wait(list(self._begun), timeout=SECONDS)
        self.run_until_complete(last)
    super().close()


class _Asyncio:
  """The module asyncio with another `new_event_loop`."""

  new_event_loop = DrainingEventLoop

  def __getattr__(self, name: str) -> Any:
    return getattr(asyncio, name)


@contextlib.contextmanager
def draining_event_loops():
  """Makes Orbax use draining event loops, in any thread.

  It replaces the name `asyncio` in the one module of Orbax that makes loops, so
  that no other library's loops change. (An event loop policy would change them
  all, and is deprecated from Python 3.14.)
  """
  before = asyncio_utils.asyncio
  asyncio_utils.asyncio = _Asyncio()
  try:
    yield
  finally:
    asyncio_utils.asyncio = before


def in_thread[T](call: Callable[[], T]) -> T:
  """Returns call(), made in a thread that has no event loop.

  In the thread of a notebook, which has one, Orbax uses a loop of another kind.
  """
  with futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(call).result()
