"""Leases: a job has one holder, whoever dies, sleeps or races for it."""

import json
import os
import signal
import threading
import types

import plain_python
import pytest

from mhc.runtime import leases

HOLD = """
import pathlib
from mhc.runtime import leases
folder, name, patience = sys.argv[1:]
watcher = leases.Watcher(float(patience))
lease = leases.take(pathlib.Path(folder), name, watcher)
print(lease and lease.generation, flush=True)
sys.stdin.read()
"""
# All have watched the same claims for the same time when they go for them.
RACE = """
import os, pathlib, time
from mhc.runtime import leases
folder, patience = pathlib.Path(sys.argv[1]), float(sys.argv[2])
watcher, names = leases.Watcher(patience), sys.argv[3:]
assert not watcher.free(folder, names)
start = time.monotonic() + 1.2 * patience
for _ in range(8):
  if os.fork():
    continue
  for number, name in enumerate(names):
    time.sleep(max(0, start + 0.04 * number - time.monotonic()))
    if leases.take(folder, name, watcher):
      os.write(1, f'{name}\\n'.encode())
  time.sleep(0.2)
  os._exit(0)
for _ in range(8):
  os.wait()
"""
NEVER = pytest.fail


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands still until a test moves it."""
  clock = types.SimpleNamespace(now=100.0)
  time = types.SimpleNamespace(monotonic=lambda: clock.now)
  monkeypatch.setattr(leases, 'time', time)
  return clock


def claim(folder, name, content='', generation=0):
  folder.mkdir(exist_ok=True)
  file = folder / f'{name}.{generation}'
  file.write_text(content)
  return file


def mine(**changes):
  """What a claim of this process says."""
  return json.dumps({**leases._this_process(os.getpid()), **changes})


def hold(folder, name, patience=30.0):
  """Starts a process that holds a job; returns it with its generation."""
  process = plain_python.start(HOLD, folder, name, patience)
  return process, process.stdout.readline().strip()


def test_one_holds_and_releases(tmp_path):
  watcher, other = leases.Watcher(), leases.Watcher()
  names = ['main/mhc.1 é', 'main/mhc', '..', 'main%2Fmhc']
  folder = tmp_path / 'claims'
  assert leases.held_by(folder, names[0]) == 'nobody'
  assert watcher.free(folder, names) == names
  for name in names:
    with leases.take(folder, name, watcher, NEVER) as lease:
      assert lease.generation == 0
      assert leases.take(folder, name, watcher) is None
      assert leases.take(folder, name, other) is None
      assert other.free(folder, names) == [n for n in names if n != name]
      line = f'host {os.uname().nodename!r}, process {os.getpid()}, generation '
      assert leases.held_by(folder, name) == line + '0'
    lease.release()
    assert leases.held_by(folder, name) == f'nobody, released by {line}0'
    with leases.take(folder, name, other, NEVER) as lease:
      assert leases.held_by(folder, name) == line + '1'
  assert len([*folder.iterdir()]) == 2 * len(names)
  with pytest.raises(ValueError, match="'' is no name"):
    leases.take(folder, '', watcher)
  with pytest.raises(ValueError, match=r'-1.0 s must be more than 0 s'):
    leases.Watcher(-1.0)


def test_a_process_that_is_gone_is_replaced_at_once(tmp_path):
  process, generation = hold(tmp_path, 'a')
  assert generation == '0'
  watcher = leases.Watcher()
  assert leases.take(tmp_path, 'a', watcher) is None
  process.kill()
  process.communicate()
  with leases.take(tmp_path, 'a', watcher, NEVER) as lease:
    assert lease.generation == 1


@pytest.mark.parametrize(
  'content',
  [
    '',
    '\0\0\0',
    '{"host": "a", "pi',
    '[1, 2]',
    '[' * 10**5,
    '{"released": 1, "pid": "x"}',
    '\ud800é',
  ],
)
def test_a_claim_that_says_nothing_lasts_its_time(tmp_path, clock, content):
  file = claim(tmp_path, 'a')
  file.write_bytes(content.encode(errors='surrogatepass'))
  watcher = leases.Watcher(60.0)
  assert watcher.free(tmp_path, ['a', 'b']) == ['b']
  assert leases.held_by(tmp_path, 'a').startswith('an unreadable claim')
  clock.now += 59.9
  assert leases.take(tmp_path, 'a', watcher) is None
  # A change of it, such as its other half, is a sign of life.
  file.write_bytes(b'x' + content.encode(errors='surrogatepass'))
  clock.now += 0.2
  assert not watcher.free(tmp_path, ['a'])
  clock.now += 60
  assert not leases.Watcher(60.0).free(tmp_path, ['a'])  # has seen it just now
  lease = leases.take(tmp_path, 'a', watcher, NEVER)
  lease.release()
  assert lease.generation == 1


@pytest.mark.parametrize(
  'changes',
  [
    {},  # the number belongs to a process, maybe another one by now
    {'pid': 1},
    {'host': 'other'},
    {'boot': 'other'},
    {'boot': None},
    {'pid_namespace': 'pid:[1]'},
    {'pid': 10**30},
    {'pid': -1},
    {'pid': True},
  ],
)
def test_only_patience_tells_of_other_processes(tmp_path, clock, changes):
  gone = {'pid': 2**22 + 1} if 'pid' not in changes and changes else {}
  claim(tmp_path, 'a', mine(**gone, **changes))
  watcher = leases.Watcher(60.0)
  assert not watcher.free(tmp_path, ['a'])
  clock.now += 59.9
  assert not watcher.free(tmp_path, ['a'])
  clock.now += 0.2
  assert watcher.free(tmp_path, ['a']) == ['a']


def test_a_cached_list_of_the_folder_does_not_matter(tmp_path, monkeypatch):
  watcher = leases.Watcher()
  monkeypatch.setattr(leases.os, 'listdir', lambda folder: [])
  claim(tmp_path, 'a', mine())
  assert watcher.free(tmp_path, ['a']) == ['a']
  assert leases.take(tmp_path, 'a', watcher) is None
  assert not watcher.free(tmp_path, ['a'])


def test_a_holder_that_is_late_must_win_to_go_on(tmp_path, clock):
  lease = leases.take(tmp_path, 'a', leases.Watcher(600.0), NEVER)
  clock.now += 299
  assert lease._beat()
  assert lease.generation == 0
  clock.now += 301
  assert lease._beat()
  assert lease.generation == 1
  assert leases.held_by(tmp_path, 'a').endswith('generation 1')
  claim(tmp_path, 'a', mine(pid=1), 2)
  assert not lease._beat()
  lease.release()


def test_a_claim_that_a_cache_hides_is_found_when_late(
  tmp_path, clock, monkeypatch
):
  lease = leases.take(tmp_path, 'a', leases.Watcher(600.0), NEVER)
  claim(tmp_path, 'a', mine(pid=1), 1)
  monkeypatch.setattr(type(tmp_path), 'exists', lambda path: False)
  assert lease._beat()
  clock.now += 301
  assert not lease._beat()
  monkeypatch.undo()
  lease.release()


def test_who_has_lost_is_told_once_and_writes_no_more(tmp_path):
  told = []
  lease = leases.take(tmp_path, 'a', leases.Watcher(0.3), told.append)
  claim(tmp_path, 'a', mine(pid=1), 1)
  plain_python.wait_for(lambda: told)
  before = (tmp_path / 'a.0').read_bytes()
  lease.release()
  assert told == [lease]
  assert (tmp_path / 'a.0').read_bytes() == before


def test_errors_are_said_once_and_tried_again(tmp_path, capfd):
  told = []
  lease = leases.take(tmp_path, 'a', leases.Watcher(0.3), told.append)
  (tmp_path / 'a.0').rename(tmp_path / 'away')
  said = []

  def error():
    said.append(capfd.readouterr().err)
    return 'a: no sign of life: ' in ''.join(said)

  plain_python.wait_for(error)
  claim(tmp_path, 'a')
  plain_python.wait_for(lambda: 'process' in leases.held_by(tmp_path, 'a'))
  lease.release()
  said.append(capfd.readouterr().err)
  assert ''.join(said).count('\n') == 1
  assert not told
  assert leases.held_by(tmp_path, 'a').startswith('nobody, released')


def test_who_slept_too_long_ends_and_the_other_goes_on(tmp_path):
  process, generation = hold(tmp_path, 'main/a', 0.5)
  assert generation == '0'
  process.send_signal(signal.SIGSTOP)
  watcher, told = leases.Watcher(0.5), []
  lease = plain_python.wait_for(
    lambda: leases.take(tmp_path, 'main/a', watcher, told.append)
  )
  with lease:
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=10) == leases.LOST_STATUS == 3
    _, error = process.communicate()
    assert error.count('\n') == 2  # a progress bar may stand on the first line
    assert f'\nmain/a: lost to host {os.uname().nodename!r}, process' in error
  assert not told


def test_one_of_many_takes_over(tmp_path):
  names = [f'job{number}' for number in range(6)]
  for name in names:
    claim(tmp_path, name, mine(host='other'))
  out, error = plain_python.start(RACE, tmp_path, 0.5, *names).communicate()
  assert (sorted(out.split()), error) == (names, '')


def test_a_start_beside_a_live_one_is_refused_and_a_dead_one_followed(
  tmp_path, capsys
):
  folder = tmp_path / 'run' / 'lock'
  held = leases.take(folder, 'run', leases.Watcher())
  with pytest.raises(ValueError, match=rf'run is in use by .* {os.getpid()},'):
    leases.take_when_free(folder, 'run')
  held.release()
  with leases.take_when_free(folder, 'run') as mine:
    assert mine.generation == 1
  # Of another host: whether it lives is seen by its signs alone.
  values = {'host': 'other', 'pid': 7, 'sign_of_life': '0'}
  other = claim(folder, 'run', json.dumps(values), 2)
  with leases.take_when_free(folder, 'run', 0.3, poll_s=0.02) as mine:
    assert mine.generation == 3
  said = capsys.readouterr().err
  assert said.count("sign of life of host 'other', process 7") == 1
  other = claim(folder, 'run', json.dumps(values), 4)
  beat = threading.Timer(0.2, lambda: other.write_text(json.dumps(values)[:-1]))
  beat.start()
  with pytest.raises(ValueError, match='is in use by an unreadable claim'):
    leases.take_when_free(folder, 'run', 5.0)
  beat.join()
