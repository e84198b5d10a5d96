"""Workers that share the jobs of one folder, on one machine or several."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
import contextlib
import functools
import glob
import math
import os
import signal
import subprocess
import sys
import time

from mhc.runtime import console
from mhc.runtime import leases
from mhc.runtime import paths
from mhc.runtime import processes
from mhc.runtime import signals

GPUS = '/dev/nvidia[0-9]*'
# The share of a GPU that JAX takes at once, and what workers on one divide.
FRACTION, GPU_MEMORY = 'XLA_PYTHON_CLIENT_MEM_FRACTION', 0.9
POLL_S = 0.05


def run_jobs(
  names: Callable[[], Sequence[str]],
  do: Callable[[str], object],
  is_done: Callable[[str], bool],
  program_of: Callable[[str], Hashable],
  folder: paths.Path,
  *,
  is_complete: Callable[[], bool] = lambda: True,
  patience: float = leases.PATIENCE,
  poll_s: float = 2.0,
  say: Callable[[str], object] = console.print_line,
):
  """Does jobs one after the other, beside other workers, until all are done.

  Each is done by one worker at a time, which holds a lease of it in `folder`.
  Those of workers that have died are done again. If `do` raises, its job is
  left to others.

  Args:
    names: the jobs that there are by now, in the order of preference.
    do: does a job; `is_done` must then be true of it, in every worker.
    is_done: is asked again when a job has been taken.
    program_of: what of a job is compiled. A worker prefers jobs of programs
      that it has done, then of those that no other one is doing.
    is_complete: whether `names` will have no more jobs.
    patience: seconds after which a silent worker counts as dead.
    poll_s: seconds between two looks while there is nothing to do.
    say: is given lines for people.
  """
  watcher, program_of = leases.Watcher(patience), functools.cache(program_of)
  done: set[str] = set()
  compiled: set[Hashable] = set()
  waiting = False
  while True:
    complete = is_complete()  # before the names, which may be more by then
    todo = [name for name in names() if name not in done]
    done.update(name for name in todo if is_done(name))
    todo = [name for name in todo if name not in done]
    if complete and not todo:
      return
    free = watcher.free(folder, todo)
    name = _choose(todo, free, program_of, compiled)
    if name is None:
      if not waiting:
        say(_waiting_line(folder, todo))
      waiting = True
      time.sleep(poll_s)
      continue
    waiting = False
    before = leases.held_by(folder, name)
    signals.check()
    lease = leases.take(folder, name, watcher)
    if lease is None:
      continue
    with lease:
      if is_done(name):
        continue
      if not before.startswith('nobody'):
        say(f'{name}: taken over from {before}')
      do(name)
      assert is_done(name), name
      compiled.add(program_of(name))


def _choose(todo, free, program_of, compiled) -> str | None:
  """The job to do next, the first in the given order of the best kind."""
  elsewhere = {program_of(name) for name in {*todo} - {*free}}

  def rank(name):
    program = program_of(name)
    return 0 if program in compiled else 1 + (program in elsewhere)

  return min(free, key=rank, default=None)


def _waiting_line(folder, todo) -> str:
  if not todo:
    return 'waiting for jobs'
  holder = leases.held_by(folder, todo[0])
  rest = f' and {len(todo) - 1} more' if todo[1:] else ''
  return f'waiting for {todo[0]} ({holder}){rest}'


def start_local(number: int, arguments: Sequence[str]) -> list[int]:
  """Runs `number` workers on this machine; returns their exit statuses.

  Each is a Python with `arguments` and --worker, on its share of the cores and,
  where there are GPUs, on one of them. To be called from the main thread, until
  it returns each signal that asks for a stop is passed on to all of them. They
  get SIGTERM, too, when this process ends without having waited for them (on
  Linux). A status is negative if a signal ended the worker.

  Raises:
    ValueError: `number` is not positive.
  """
  if number < 1:
    raise ValueError(f'{number} workers cannot do anything: start at least 1')
  environments = [_with_gpu(i, number, os.environ) for i in range(number)]
  received: list[int] = []
  workers: list[subprocess.Popen] = []
  note = lambda number, _: received.append(number)
  replaced = {each: signal.signal(each, note) for each in signals.heeded()}
  try:
    for index, environment in enumerate(environments):
      if not received:
        workers.append(_start(index, number, arguments, environment))
    passed = 0
    while any(worker.poll() is None for worker in workers):
      if passed < len(received):
        _tell(workers, received[passed])
        passed += 1
      time.sleep(POLL_S)
  except BaseException:
    _tell(workers, signal.SIGTERM)
    raise
  finally:
    for each, handler in replaced.items():
      if handler is not None:  # not one of C++, which Python cannot restore
        signal.signal(each, handler)
  return [worker.returncode for worker in workers]


def most() -> int:
  """The number of workers that this machine has a GPU or a core for."""
  return len(_gpus(os.environ)) or processes.num_cores()


@contextlib.contextmanager
def share_of_cores(index: int, number: int) -> Iterator[None]:
  """Runs this thread, and what it starts, on one of `number` shares.

  On Linux, and if there are as many cores.
  """
  ours = os.sched_getaffinity(0) if sys.platform == 'linux' else set()
  if len(ours) >= number:
    os.sched_setaffinity(0, sorted(ours)[index::number])
  try:
    yield
  finally:
    if len(ours) >= number:
      os.sched_setaffinity(0, ours)


def _start(index, number, arguments, environment) -> subprocess.Popen:
  command = (sys.executable, *arguments, '--worker')
  with share_of_cores(index, number):  # a child inherits them
    return subprocess.Popen(
      processes.tied(command),
      env=environment,
      stdin=subprocess.DEVNULL,
      # A terminal's Ctrl-C reaches it through this process only.
      start_new_session=True,
    )


def _tell(workers, number):
  for worker in workers:
    worker.send_signal(number)


def _gpus(environment: Mapping[str, str]) -> list[str]:
  """The GPUs that CUDA shows under `environment`, as it is to name them."""
  found = [str(i) for i in range(len(glob.glob(GPUS)))]
  allowed = environment.get('CUDA_VISIBLE_DEVICES')
  if allowed is not None and found:
    found = [entry.strip() for entry in allowed.split(',') if entry.strip()]
  return [] if found[:1] == ['-1'] else found


def _with_gpu(
  index: int, number: int, environment: Mapping[str, str]
) -> dict[str, str]:
  """The environment of a worker, which shows it one GPU if there are any.

  More workers than GPUs take turns on them, each with a share of the memory,
  unless the environment says how much.
  """
  found = _gpus(environment)
  if not found:
    return dict(environment)
  own = {'CUDA_VISIBLE_DEVICES': found[index % len(found)]}
  together = math.ceil(number / len(found))
  if together > 1:
    fraction = f'{GPU_MEMORY / together:.3f}'
    own[FRACTION] = environment.get(FRACTION, fraction)
  return {**environment, **own}
