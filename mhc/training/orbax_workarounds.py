"""An event loop that does not end before what it has begun.

Orbax reads and writes the arrays of a state at once, in an asyncio loop that it
closes with the first of them that fails. TensorStore's threads then report the
others to a loop that is gone: tracebacks on the terminal, and, seen once, a
crash of the interpreter.
"""

import asyncio
from collections.abc import Callable
from concurrent import futures
import contextlib

# Longer than what is left of a read takes; what hangs is not waited for.
SECONDS = 60


class PatientLoop(asyncio.SelectorEventLoop):
  """Waits for its tasks when it is closed, and drops what they say."""

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
      # The first error has been raised; the others are its company.
      self.set_exception_handler(lambda loop, context: None)
      if self._begun:
        last = asyncio.wait(list(self._begun), timeout=SECONDS)
        self.run_until_complete(last)
    super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self):
    return PatientLoop()


@contextlib.contextmanager
def patient():
  """Loops that are made meanwhile, in any thread, are patient."""
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_Policy())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(before)


def apart[T](call: Callable[[], T]) -> T:
  """call() in a thread without a loop: in that of a notebook, which has one,
  Orbax takes a loop of another kind.
  """
  with futures.ThreadPoolExecutor(1) as pool:
    return pool.submit(call).result()
