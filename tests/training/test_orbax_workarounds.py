"""Event loops of Orbax that end after the tasks they have begun."""

import asyncio
import contextlib
import gc
import threading

from orbax.checkpoint._src import asyncio_utils
import pytest

from mhc.training import orbax_workarounds


def fail_beside(other, number=1, loops=orbax_workarounds.draining_event_loops):
  """Has Orbax run a task that fails when `other` has begun."""

  async def first(begun):
    await begun.wait()
    raise ValueError('first')

  async def company():
    begun = asyncio.Event()
    await asyncio.gather(first(begun), *(other(begun) for _ in range(number)))

  with loops(), pytest.raises(ValueError, match='first'):
    asyncio_utils.run_sync(company())


def reporter(said):
  """A task that a thread reports to, 0.2 s later; `said` gets what comes."""

  async def late(begun):
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def report():
      try:
        loop.call_soon_threadsafe(future.set_result, 'here')
      except RuntimeError as error:
        said.append(error)

    threading.Timer(0.2, report).start()
    begun.set()
    said.append(await future)

  return late


def test_a_thread_reports_to_a_loop_that_is_there():
  said = []
  fail_beside(reporter(said))
  assert said == ['here']


def test_orbax_alone_closes_its_loop_early():
  """When this fails, Orbax needs none of `orbax_workarounds`."""
  said = []
  fail_beside(reporter(said), loops=contextlib.nullcontext)
  for thread in threading.enumerate():
    if isinstance(thread, threading.Timer):
      thread.join()
  assert [str(error) for error in said] == ['Event loop is closed']
  gc.collect()


def test_only_the_first_error_is_heard(caplog):
  async def other(begun):
    begun.set()
    await asyncio.sleep(0.05)
    raise ValueError('second')

  fail_beside(other, 3)
  gc.collect()
  assert not caplog.records


def test_what_hangs_is_given_up(monkeypatch):
  monkeypatch.setattr(orbax_workarounds, 'SECONDS', 0.1)

  async def forever(begun):
    begun.set()
    await asyncio.Event().wait()

  fail_beside(forever)
  gc.collect()


def test_a_notebook_with_a_running_loop():
  async def loop_of_orbax():
    return type(asyncio.get_running_loop())

  async def cell():
    return orbax_workarounds.in_thread(
      lambda: asyncio_utils.run_sync(loop_of_orbax())
    )

  with orbax_workarounds.draining_event_loops():
    assert asyncio.run(cell()) is orbax_workarounds.DrainingEventLoop


def test_other_loops_are_as_before():
  def is_draining(module):
    with contextlib.closing(module.new_event_loop()) as loop:
      return isinstance(loop, orbax_workarounds.DrainingEventLoop)

  with orbax_workarounds.draining_event_loops():
    assert is_draining(asyncio_utils.asyncio)
    assert not is_draining(asyncio)
  assert not is_draining(asyncio_utils.asyncio)
