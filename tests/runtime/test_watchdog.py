"""What a process does, how long, and where it is stuck."""

import threading
import time

from mhc.runtime import phases
from mhc.runtime import watchdog


def test_seconds_add_up():
  mine = phases.Phases()
  begun = sum(mine.seconds().values())
  assert begun >= 0  # of the process before
  start = time.monotonic()
  with mine.phase('outer'):
    time.sleep(0.05)
    with mine.phase('inner'):
      time.sleep(0.1)
      assert mine.now()[0] == 'inner'
    assert mine.now()[0] == 'outer'
  found = mine.seconds()
  assert found['outer'] >= 0.05
  assert found['inner'] >= 0.1
  whole = time.monotonic() - start
  assert abs(sum(found.values()) - begun - whole) < 0.5


def test_phases_of_other_threads_do_not_count():
  mine = phases.Phases()

  def other():
    with mine.phase('other'):
      time.sleep(0.01)

  thread = threading.Thread(target=other)
  thread.start()
  thread.join()
  assert 'other' not in mine.seconds()


def stuck_here(seconds):
  time.sleep(seconds)


def test_what_is_stuck_is_named_with_its_stacks(capsys):
  with watchdog.Watchdog(1.0, frozenset({'compiling'})):
    with phases.phase('compiling'):
      time.sleep(1.3)
    with phases.phase('step'):
      for _ in range(13):  # slow, but it gets somewhere
        time.sleep(0.1)
        phases.progress()
    assert capsys.readouterr().err == ''
    with phases.phase('saving'):
      stuck_here(1.8)
  said = capsys.readouterr().err
  assert 'STUCK: saving has got nowhere for' in said
  assert 'stuck_here' in said
  assert said.count('STUCK') <= 2  # then after twice the time
  with watchdog.Watchdog(0.0), phases.phase('saving'):
    time.sleep(0.1)
  assert capsys.readouterr().err == ''


def test_a_phase_may_take_as_long_as_it_has_taken(capsys):
  with watchdog.Watchdog(0.6):
    for seconds in (0.3, 1.2):  # at most ten times as long
      with phases.phase('evaluating'):
        time.sleep(seconds)
      with phases.phase('step'):
        time.sleep(0.02)
  assert capsys.readouterr().err == ''
