"""Trains under faults, and compares the result with an undisturbed run.

A trial starts launch/train.py in a process of its own, injects a fault, and
starts the same command again until the run is finished. It survives if every
start ended as promised, without a traceback, and if the run's losses,
parameters and optimiser are bit for bit those of the undisturbed run.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import faults
import jax
import numpy as np

from mhc.runtime import json_lines
from mhc.training import checkpoint
from mhc.training import state as state_lib
from mhc.training import step as step_lib
from mhc.training import workdir as workdir_lib

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / 'launch'
STEPS, SAVE_EVERY = 240, 12
SETTINGS = {
  'num_steps': STEPS,
  'checkpoint_every': SAVE_EVERY,
  'keep_checkpoints': 3,
  'eval_every': 0,
  'eval_sequences': 8,
  'probe_every': 40,
  'model.num_blocks': 1,
  'model.dim': 16,
  'model.ffn_dim': 16,
  'model.attention.num_heads': 1,
  'model.attention.head_dim': 8,
  'model.attention.rope_dim': 4,
  'model.attention.kv_rank': 8,
  'data.seq_len': 16,
  'data.batch_size': 4,
  'mesh.num_devices': 1,
}
PATIENCE = 180.0  # timeout in seconds, for what takes a few


class Failure(Exception):
  """A run did not behave as promised."""


class Trial(NamedTuple):
  fault: str
  number: int
  survived: bool
  seconds: float
  said: str  # the fault, or the reason of the failure


@dataclasses.dataclass
class Run:
  """One run's folder and the command that trains it."""

  workdir: pathlib.Path
  text: pathlib.Path
  wrapper: tuple[str, ...] = ()
  processes: int = 1
  log: str = ''

  @property
  def command(self) -> list[str]:
    main = [str(LAUNCH / 'train.py'), f'--workdir={self.workdir}']
    settings = SETTINGS | {'data.path': self.text}
    if self.processes > 1:
      settings |= {'mesh.num_devices': self.processes, 'mesh.pipe': 1}
      launcher = str(LAUNCH / 'local_multiprocess.py')
      main = [launcher, f'--processes={self.processes}', '--', *main]
    flags = [f'--config.{name}={value}' for name, value in settings.items()]
    return [sys.executable, *self.wrapper, *main, *flags]

  def start(self) -> subprocess.Popen:
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONFAULTHANDLER': '1',
      'JAX_COMPILATION_CACHE_DIR': str(self.workdir.parents[1] / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    return subprocess.Popen(
      self.command,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )

  def wait(self, process: subprocess.Popen, tracebacks: bool = False) -> int:
    """Waits for its end; returns the exit status and logs its stderr.

    `tracebacks` allows one, as of a process whose peer is gone.
    """
    try:
      said = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGABRT)  # prints its stack
      said = process.communicate()[1]
      raise Failure(f'no end after {PATIENCE:.0f} s: {said}') from None
    self.log += said
    if 'Traceback' in said and not tracebacks:
      raise Failure(f'a traceback: {said[said.index("Traceback") :][:2000]}')
    return process.returncode

  def reaches(self, step: int, process: subprocess.Popen) -> bool:
    """Waits for a step; False if the run ended before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
      if self.steps() >= step:
        return True
      if process.poll() is not None:
        return False
      time.sleep(0.002)
    raise Failure(f'no step {step} after {PATIENCE:.0f} s')

  def steps(self) -> int:
    try:
      return (self.workdir / 'metrics.jsonl').read_bytes().count(b'\n')
    except FileNotFoundError:
      return 0

  def saved(self) -> list[int]:
    """Steps of its checkpoints, the newest first."""
    try:
      names = [p.name for p in (self.workdir / 'checkpoints').iterdir()]
    except FileNotFoundError:
      return []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)

  def newest(self) -> pathlib.Path:
    return self.workdir / 'checkpoints' / str(self.saved()[0])

  def finish(self):
    """Starts the same command again, which must finish the run."""
    status = self.wait(self.start())
    if status or not (self.workdir / 'summary.json').exists():
      raise Failure(f'restarted, it ended with status {status}: {self.log}')

  def outcome(self) -> tuple[list[dict], state_lib.TrainState]:
    """Returns every step's metrics except times, and the last checkpoint."""
    lines = json_lines.read_lines(self.workdir / 'metrics.jsonl')
    config = workdir_lib.read_config(self.workdir)
    one = dataclasses.replace(config.mesh, num_devices=1)
    programs = step_lib.build(dataclasses.replace(config, mesh=one))
    state = checkpoint.restore(self.workdir, programs.saved_state)
    metrics = [
      {k: v for k, v in line.items() if not k.startswith('time/')}
      for line in lines
    ]
    return metrics, jax.device_get(state)


def killed(run: Run, chance: random.Random) -> str:
  """SIGKILL at a step, up to three times."""
  times = chance.randint(1, 3)
  for _ in range(times):
    process = run.start()
    run.reaches(min(STEPS - 2, run.steps() + chance.randrange(1, 90)), process)
    process.kill()
    run.wait(process)
  return f'{times} times, the last time in step {run.steps()}'


def killed_at_start(run: Run, chance: random.Random) -> str:
  """SIGKILL within the first seconds, before or after a step."""
  process, delay = run.start(), chance.uniform(0.2, 8)
  time.sleep(delay)
  process.kill()
  run.wait(process)
  return f'after {delay:.1f} s, {run.steps()} steps'


def killed_in_save(run: Run, chance: random.Random) -> str:
  """SIGKILL while a checkpoint is being written."""
  states, least = run.workdir / 'checkpoints', chance.randrange(0, STEPS // 2)
  for attempt in range(1, 11):
    process = run.start()
    if not run.reaches(min(STEPS - 20, run.steps() + least), process):
      break
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
      if any('tmp' in name for name in os.listdir(states)):
        process.kill()
        break
    run.wait(process)
    halves = [name for name in os.listdir(states) if 'tmp' in name]
    if halves:
      return f'attempt {attempt} left {halves[0]}'
    least = 1
  raise Failure('no SIGKILL interrupted a save')


def terminated(run: Run, chance: random.Random) -> str:
  """SIGTERM: saved after the current step, status 0."""
  process = run.start()
  run.reaches(chance.randrange(1, STEPS - 40), process)
  process.terminate()
  status = run.wait(process)
  if (run.workdir / 'summary.json').exists():
    return 'it was finished already'
  last = run.steps()
  if status or f'saved after step {last}.' not in run.log:
    raise Failure(f'SIGTERM: status {status}: {run.log}')
  if run.saved()[0] != last:
    raise Failure(f'after step {last}, newest checkpoint {run.saved()[0]}')
  return f'saved after step {last}'


def _damaged(damage):
  def fault(run: Run, chance: random.Random) -> str:
    process = run.start()
    run.reaches(chance.randrange(2 * SAVE_EVERY + 4, STEPS - 4), process)
    process.kill()
    run.wait(process)
    while len(run.saved()) < 2:  # saves in the background lag behind
      process = run.start()
      run.reaches(run.steps() + SAVE_EVERY, process)
      process.kill()
      run.wait(process)
    newest = run.newest()
    files = [p for p in newest.rglob('*') if p.is_file() and p.stat().st_size]
    some = chance.choice([faults.largest(newest), *files])
    damage(some, chance)
    return f'{some.relative_to(run.workdir)}'

  return fault


def truncated(run: Run, chance: random.Random) -> str:
  """A file of the newest checkpoint truncated, after a SIGKILL."""
  return _damaged(faults.truncate)(run, chance)


def flipped(run: Run, chance: random.Random) -> str:
  """Bits of the newest checkpoint flipped, after a SIGKILL."""
  return _damaged(faults.flip)(run, chance)


def full_disk(run: Run, chance: random.Random) -> str:
  """A tmpfs of 16 MB is full for a while: training continues, saves later."""
  run.workdir.mkdir(parents=True)
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', str(run.workdir)]
  mounted = (
    shutil.which('mount')
    and not subprocess.run(mount, capture_output=True, check=False).returncode
  )
  try:
    if not mounted:
      raise Failure('no permission to mount a tmpfs: run as root')
    process = run.start()
    run.reaches(chance.randrange(5, STEPS // 2), process)
    filler = faults.fill(run.workdir)
    time.sleep(chance.uniform(0.3, 1.0))
    filler.unlink(missing_ok=True)
    status = run.wait(process)
    if status:
      raise Failure(f'ended with status {status}: {run.log}')
    lost = run.log.count('NOT SAVED')
    target = run.workdir.with_name(run.workdir.name + '-copy')
    shutil.copytree(run.workdir, target)
  finally:
    if mounted:
      subprocess.run(['umount', str(run.workdir)], check=True)
  shutil.rmtree(run.workdir)
  target.rename(run.workdir)
  return f'{lost} checkpoints not saved'


def nan_batch(run: Run, chance: random.Random) -> str:
  """Batches whose loss is NaN, and a SIGKILL: the updates are skipped."""
  run.wrapper = (faults.__file__, 'nan')
  said = killed(run, chance)
  run.finish()
  lines = json_lines.read_lines(run.workdir / 'metrics.jsonl')
  skipped = sum(line['optimizer/skipped'] for line in lines)
  events = json_lines.read_lines(run.workdir / 'events.jsonl')
  if not skipped or not any(e['guard'] == 'nonfinite' for e in events):
    raise Failure(f'{skipped:.0f} updates skipped, events {events}')
  return f'{skipped:.0f} updates skipped, killed {said}'


def clock_jump(run: Run, chance: random.Random) -> str:
  """The time of day jumps by years, and a SIGTERM."""
  run.wrapper = (faults.__file__, 'clock')
  return terminated(run, chance)


def one_of_two(run: Run, chance: random.Random) -> str:
  """SIGKILL of one of two processes: the other ends, both resume."""
  run.processes = 2
  process = run.start()
  run.reaches(chance.randrange(1, STEPS - 60), process)
  which, children = chance.randrange(2), _children(process.pid)
  for child, arguments in children.items():
    if f'--process_id={which}' in arguments:
      os.kill(child, signal.SIGKILL)
  status = run.wait(process, tracebacks=True)
  if status != 128 + signal.SIGKILL:
    raise Failure(f'the launcher ended with status {status}: {run.log}')
  return f'process {which}, after step {run.steps()}'


FAULTS: dict[str, Callable[[Run, random.Random], str]] = {
  fault.__name__: fault
  for fault in (
    killed,
    killed_at_start,
    killed_in_save,
    terminated,
    truncated,
    flipped,
    full_disk,
    nan_batch,
    clock_jump,
    one_of_two,
  )
}


def trials(
  root: pathlib.Path,
  number: int,
  seed: int,
  names: tuple[str, ...] = tuple(FAULTS),
  jobs: int = 2,
) -> Iterator[Trial]:
  """Yields trials of the faults in turn.

  Raises:
    Failure: a run without faults does not finish.
  """
  references = _references(root, names)

  def one(index):
    fault, clock = names[index % len(names)], time.monotonic()
    chance = random.Random(f'{seed} {index}')
    place = root / f'{index:03d}-{fault}'
    run = Run(place / 'run', _text(root, fault))
    try:
      said = FAULTS[fault](run, chance)
      run.finish()
      _compare(run.outcome(), references[_kind(fault)])
      survived = True
      shutil.rmtree(place)
    except Failure as failure:
      said, survived = str(failure), False
    return Trial(fault, index, survived, time.monotonic() - clock, said)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    yield from pool.map(one, range(number))


def _kind(fault):
  return fault if fault in ('nan_batch', 'one_of_two') else ''


def _text(root, fault):
  return root / ('poisoned.txt' if fault == 'nan_batch' else 'text.txt')


def _references(root, names):
  """Outcomes of the undisturbed runs."""
  root.mkdir(parents=True, exist_ok=True)
  words = np.random.default_rng(0).choice(['ab ', 'cde ', 'f\n'], 6000)
  (root / 'text.txt').write_text(''.join(words))
  words[[1000, 2000, 3000]] = '\x01'
  (root / 'poisoned.txt').write_text(''.join(words))
  found = {}
  for kind in dict.fromkeys(map(_kind, names)):
    run = Run(root / f'reference-{kind or "plain"}' / 'run', _text(root, kind))
    if kind == 'nan_batch':
      run.wrapper = (faults.__file__, 'nan')
    run.processes = 2 if kind == 'one_of_two' else 1
    run.finish()
    found[kind] = run.outcome()
  return found


def _compare(got, want):
  (lines, state), (want_lines, want_state) = got, want
  for line, want_line in zip(lines, want_lines, strict=False):
    if line != want_line:
      raise Failure(f'step differs: {line}, not {want_line}')
  if len(lines) != len(want_lines):
    raise Failure(f'{len(lines)} steps, not {len(want_lines)}')
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state),
    jax.tree.leaves(want_state),
    strict=True,
  ):
    if not np.array_equal(a, b):
      raise Failure(f'{jax.tree_util.keystr(path)} differs')


def _children(parent):
  """Maps the ids of child processes to their command lines."""
  listed = subprocess.run(
    ['ps', '-o', 'pid=,args=', '--ppid', str(parent)],
    capture_output=True,
    text=True,
    check=False,
  ).stdout
  lines = (line.split(None, 1) for line in listed.splitlines())
  return {int(pid): arguments for pid, arguments in lines}
