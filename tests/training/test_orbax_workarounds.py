"""Loops that end after what they have begun."""

import asyncio
import contextlib
import gc
import threading

import pytest

from mhc.training import orbax_workarounds


def fail_beside(other, number=1):
  """Runs, as Orbax does, what fails when `other` has begun."""

  async def first(begun):
    await begun.wait()
    raise ValueError('first')

  async def company():
    begun = asyncio.Event()
    await asyncio.gather(first(begun), *(other(begun) for _ in range(number)))

  with orbax_workarounds.patient():
    loop = asyncio.new_event_loop()
  with pytest.raises(ValueError, match='first'), contextlib.closing(loop):
    loop.run_until_complete(company())


def test_a_thread_reports_to_a_loop_that_is_there():
  said = []

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

  fail_beside(late)
  assert said == ['here']


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


def test_loops_are_as_before_afterwards():
  with orbax_workarounds.patient():
    pass
  loop = asyncio.new_event_loop()
  loop.close()
  assert not isinstance(loop, orbax_workarounds.PatientLoop)
