"""Loops that end after what they have begun."""

import asyncio
import gc
import threading

import pytest

from mhc import patience


def refused():
  raise ValueError('first')


async def company(begun, *others):
  """One that fails at once beside others."""

  async def first():
    await begun.wait()
    refused()

  await asyncio.gather(first(), *others)


def run(loop, coroutine):
  """As Orbax does."""
  try:
    loop.run_until_complete(coroutine)
  finally:
    loop.close()


def test_a_thread_reports_to_a_loop_that_is_there():
  said = []

  async def late(begun):
    future = loop.create_future()

    def report():
      try:
        loop.call_soon_threadsafe(future.set_result, 'here')
      except RuntimeError as error:
        said.append(error)

    threading.Timer(0.2, report).start()
    begun.set()
    said.append(await future)

  with patience.patient():
    loop = asyncio.new_event_loop()
  begun = asyncio.Event()
  with pytest.raises(ValueError, match='first'):
    run(loop, company(begun, late(begun)))
  assert said == ['here']


def test_only_the_first_error_is_heard(caplog):
  async def other(begun):
    begun.set()
    await asyncio.sleep(0.05)
    raise ValueError('second')

  with patience.patient():
    loop = asyncio.new_event_loop()
  begun = asyncio.Event()
  with pytest.raises(ValueError, match='first'):
    run(loop, company(begun, *(other(begun) for _ in range(3))))
  gc.collect()
  assert not caplog.records


def test_what_hangs_is_given_up(monkeypatch):
  monkeypatch.setattr(patience, 'SECONDS', 0.1)

  async def forever(begun):
    begun.set()
    await asyncio.Event().wait()

  with patience.patient():
    loop = asyncio.new_event_loop()
  begun = asyncio.Event()
  with pytest.raises(ValueError, match='first'):
    run(loop, company(begun, forever(begun)))
  gc.collect()


def test_loops_are_as_before_afterwards():
  with patience.patient():
    pass
  loop = asyncio.new_event_loop()
  loop.close()
  assert not isinstance(loop, patience.PatientLoop)
