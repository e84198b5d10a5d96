"""Workers: each job is done once, by whoever is left to do it."""

import itertools
import os
import signal
import threading
import time

import plain_python
import pytest

from mhc.experiments import workers
from mhc.runtime import leases

WORK = """
import os, pathlib, time
from mhc.experiments import workers
folder, seconds, *names = sys.argv[1:]
folder = pathlib.Path(folder)
done = folder / 'done'
done.mkdir(exist_ok=True)
def note(word, name):
  with (folder / 'log').open('ab', buffering=0) as log:
    log.write(f'{word} {name} {os.getpid()}\\n'.encode())
def do(name):
  note('start', name)
  time.sleep(float(seconds))
  (done / name).touch()
  note('end', name)
workers.run_jobs(
  lambda: names, do, lambda name: (done / name).exists(), lambda name: name[0],
  folder / 'claims', poll_s=0.02,
)
"""
# Starts two workers that note their cores and wait.
START = """
from mhc.experiments import workers
print(*workers.start_local(int(sys.argv[1]), sys.argv[2:]))
"""
WORKER = """
import itertools, os, pathlib, signal, sys, time
folder, status, last = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[-1]
for number in itertools.count():
  try:
    file = (folder / f'worker{number}').open('x')
    break
  except FileExistsError:
    pass
signals = []
for each in signal.SIGTERM, signal.SIGINT:
  signal.signal(each, lambda number, _: signals.append(number))
cores = ','.join(map(str, sorted(os.sched_getaffinity(0))))
print(last, cores, file=file, flush=True)
if status == 'number':
  sys.exit(number)
while not signals:
  time.sleep(0.01)
time.sleep(0.2)
(folder / f'ended{number}').write_text(repr([int(each) for each in signals]))
sys.exit(143)
"""


def events(folder):
  """Pairs of a word and a job, with the process, in the order of time."""
  file = folder / 'log'
  lines = file.read_text().splitlines() if file.exists() else []
  return [tuple(line.split()) for line in lines]


def finish(processes):
  for process in processes:
    _, error = process.communicate(timeout=30)
    assert process.returncode == 0, error


def is_busy(folder, pid):
  words = [word for word, _, other in events(folder) if other == pid]
  return words[-1:] == ['start']


class Jobs:
  """Jobs of this process, which are done when they say so."""

  def __init__(self, *names):
    self.names, self.done, self.said = list(names), [], []

  def run(self, folder, do=None, **options):
    workers.run_jobs(
      lambda: self.names,
      do or self.done.append,
      lambda name: name in self.done,
      lambda name: name[0],
      folder,
      poll_s=0.02,
      say=self.said.append,
      **options,
    )


def test_eight_do_forty_jobs_once(tmp_path):
  names = [f'{kind}{number}' for kind in 'abcd' for number in range(10)]
  started = [plain_python.start(WORK, tmp_path, 0.01, *names) for _ in range(8)]
  finish(started)
  for word in ('start', 'end'):
    found = [name for what, name, _ in events(tmp_path) if what == word]
    assert sorted(found) == sorted(names)


def test_those_that_are_killed_are_replaced(tmp_path):
  names = [f'a{number}' for number in range(8)]
  started = [plain_python.start(WORK, tmp_path, 0.2, *names) for _ in range(4)]
  killed = []
  for process in started[:3]:
    pid = str(process.pid)
    plain_python.wait_for(lambda pid=pid: is_busy(tmp_path, pid))
    process.kill()
    process.communicate()
    killed.append(pid)
  finish(started[3:])
  holder = {}
  for word, name, pid in events(tmp_path):
    if word == 'start':
      assert holder.get(name) in (None, *killed), name
      holder[name] = pid
    else:
      assert holder[name] == pid
      holder[name] = 'done'
  assert holder.keys() == {*names}
  # One may have been killed between its end and its note.
  assert {*holder.values()} <= {'done', *killed}


def test_programs_that_are_compiled_come_first(tmp_path):
  jobs = Jobs('a1', 'a2', 'b1', 'c1', 'b2', 'c2', 'a3')
  watcher = leases.Watcher()
  other = leases.take(tmp_path, 'a1', watcher, pytest.fail)
  finished = threading.Event()

  def do(name):
    if len(jobs.done) == 5:
      jobs.done.append('a1')
      other.release()
      finished.set()
    jobs.done.append(name)

  jobs.run(tmp_path, do)
  assert finished.is_set()
  # Of `a`, which the other does, only when there is nothing else.
  assert jobs.done == ['b1', 'b2', 'c1', 'c2', 'a2', 'a1', 'a3']


def test_what_fails_is_left_to_others(tmp_path):
  jobs = Jobs('a')

  def fail(name):
    raise RuntimeError(f'cannot do {name}')

  with pytest.raises(RuntimeError, match='cannot do a'):
    jobs.run(tmp_path, fail)
  assert leases.held_by(tmp_path, 'a').startswith('nobody, released')
  jobs.run(tmp_path)
  assert jobs.done == ['a']
  assert not jobs.said


def test_jobs_that_come_later_are_waited_for(tmp_path):
  jobs = Jobs()
  looks = itertools.count()

  def is_complete():
    if next(looks) == 3:
      jobs.names.append('a')
    return len(jobs.names) == 1

  jobs.run(tmp_path, is_complete=is_complete)
  assert jobs.done == ['a']
  assert jobs.said == ['waiting for jobs']


def test_a_silent_holder_is_waited_for_and_replaced(tmp_path):
  (tmp_path / 'a.0').write_text('{"host": "other", "pid": 7}')
  jobs = Jobs('a', 'b')
  start = time.monotonic()
  jobs.run(tmp_path, patience=0.3)
  assert time.monotonic() - start > 0.3
  assert jobs.done == ['b', 'a']
  holder = "host 'other', process 7, generation 0"
  assert jobs.said == [
    f'waiting for a ({holder})',
    f'a: taken over from {holder}',
  ]


def test_a_job_that_was_done_in_between_is_not_done_again(tmp_path):
  answers = iter([False, True, True])
  workers.run_jobs(
    lambda: ['a'], pytest.fail, lambda name: next(answers), len, tmp_path
  )
  assert leases.held_by(tmp_path, 'a').startswith('nobody, released')


@pytest.fixture
def script(tmp_path):
  file = tmp_path / 'worker.py'
  file.write_text(WORKER)
  return file


def test_local_workers_share_the_cores(tmp_path, script):
  number = len(os.sched_getaffinity(0))
  before = signal.getsignal(signal.SIGTERM), os.sched_getaffinity(0)
  found = workers.start_local(number, [str(script), str(tmp_path), 'number'])
  assert sorted(found) == list(range(number))
  lines = [path.read_text().split() for path in tmp_path.glob('worker[0-9]*')]
  assert {line[0] for line in lines} == {'--worker'}
  cores = sorted(int(core) for line in lines for core in line[1].split(','))
  assert cores == sorted(os.sched_getaffinity(0))
  assert (signal.getsignal(signal.SIGTERM), os.sched_getaffinity(0)) == before
  with pytest.raises(ValueError, match='0 workers'):
    workers.start_local(0, [])


def wait_for_workers(folder, name, number=2):
  files = [folder / f'{name}{i}' for i in range(number)]
  plain_python.wait_for(
    lambda: all(file.exists() and file.read_text() for file in files)
  )
  return [file.read_text() for file in files]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_workers_hear_of_signals_once(tmp_path, script, number):
  parent = plain_python.start(START, 2, script, tmp_path, 'wait')
  wait_for_workers(tmp_path, 'worker')
  parent.send_signal(number)
  out, error = parent.communicate(timeout=10)
  assert (out, error, parent.returncode) == ('143 143\n', '', 0)
  assert wait_for_workers(tmp_path, 'ended') == [f'[{int(number)}]'] * 2


def test_local_workers_end_when_their_parent_does(tmp_path, script):
  parent = plain_python.start(START, 2, script, tmp_path, 'wait')
  wait_for_workers(tmp_path, 'worker')
  parent.kill()
  parent.communicate(timeout=10)  # until the workers have closed their ends
  assert wait_for_workers(tmp_path, 'ended') == [f'[{int(signal.SIGTERM)}]'] * 2


def test_each_worker_sees_a_gpu_of_its_own(tmp_path, monkeypatch):
  seen = lambda i, n, **given: workers._with_gpu(i, n, given).get(
    'CUDA_VISIBLE_DEVICES'
  )
  monkeypatch.setattr(workers, 'GPUS', str(tmp_path / 'nvidia[0-9]*'))
  assert seen(1, 2) is None
  assert seen(1, 2, CUDA_VISIBLE_DEVICES='4,5') == '4,5'
  for name in ('nvidia0', 'nvidia1', 'nvidiactl'):
    (tmp_path / name).touch()
  assert [seen(i, 2) for i in range(2)] == ['0', '1']
  assert seen(1, 2, CUDA_VISIBLE_DEVICES='4, GPU-5') == 'GPU-5'
  for none in ('', '-1'):
    assert seen(1, 2, CUDA_VISIBLE_DEVICES=none) == none


def test_workers_share_gpus(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'GPUS', str(tmp_path / 'nvidia[0-9]*'))
  for name in ('nvidia0', 'nvidia1'):
    (tmp_path / name).touch()

  def shown(number, **given):
    environments = [workers._with_gpu(i, number, given) for i in range(number)]
    return [
      (e['CUDA_VISIBLE_DEVICES'], e.get(workers.FRACTION)) for e in environments
    ]

  assert shown(2) == [('0', None), ('1', None)]
  assert shown(3) == [('0', '0.450'), ('1', '0.450'), ('0', '0.450')]
  assert shown(2, CUDA_VISIBLE_DEVICES='7') == [('7', '0.450')] * 2
  # What the user says of the memory stays.
  assert shown(4, **{workers.FRACTION: '.1'})[3] == ('1', '.1')


def test_how_many_workers_there_is_room_for(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'GPUS', str(tmp_path / 'nvidia[0-9]*'))
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  cores = workers.most()
  assert cores >= 1
  for number in range(cores + 1):
    (tmp_path / f'nvidia{number}').touch()
  assert workers.most() == cores + 1
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert workers.most() == cores
