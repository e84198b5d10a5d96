"""Trains under faults, and compares the result with an undisturbed run.

A trial starts launch/train.py in a process of its own, injects a fault, and
starts the same command again until the run is finished. It survives if every
start ended as promised, without a traceback, and if the run's losses,
parameters and optimiser are bit for bit those of the undisturbed run.
"""

from collections.abc import Callable, Iterator, Sequence
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
from typing import Any, NamedTuple

import jax
import numpy as np

from mhc.runtime import json_lines
from mhc.training import checkpoint
from mhc.training import state as state_lib
from mhc.training import step as step_lib
from mhc.training import timeline
from mhc.training import workdir as workdir_lib

FAULTS = pathlib.Path(__file__).with_name('faults.py')
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
  # For the sake of the compiler.
  'model.connection.sinkhorn_iters': 3,
  'model.recompute': 'none',
  'data.seq_len': 16,
  'data.batch_size': 4,
  'mesh.num_devices': 1,
}
PATIENCE = 180.0  # timeout in seconds, for what takes a few


class Failure(Exception):
  """A run did not behave as promised."""


class Fault(NamedTuple):
  """What is done to a run, which must then end as promised."""

  do: Callable[['Run', random.Random], str]
  # 'nan' and 'two' are compared with an undisturbed run of that kind.
  like: str = 'plain'
  # Whether all metrics must be there afterwards, or only what is left agree.
  keeps_records: bool = True

  @property
  def name(self) -> str:
    return self.do.__name__

  @property
  def what(self) -> str:
    return self.do.__doc__.strip().rstrip('.')


class Trial(NamedTuple):
  fault: str
  number: int
  survived: bool
  seconds: float
  said: str  # the fault, or the reason of the failure
  goodput: float | None = None  # share of the time that trained
  lost_steps: int | None = None  # trained again


@dataclasses.dataclass
class Run:
  """One run's folder and the command that trains it."""

  workdir: pathlib.Path
  text: pathlib.Path
  wrapper: tuple[str, ...] = ()
  processes: int = 1
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  log: str = ''
  begun: int = 0  # steps of an earlier process that there were at a start

  @property
  def is_finished(self) -> bool:
    return (self.workdir / 'summary.json').exists()

  @property
  def command(self) -> list[str]:
    main = [str(LAUNCH / 'train.py'), f'--workdir={self.workdir}']
    settings = SETTINGS | self.settings | {'data.path': self.text}
    if self.processes > 1:
      settings |= {'mesh.num_devices': self.processes, 'mesh.pipe': 1}
      launcher = str(LAUNCH / 'local_multiprocess.py')
      main = [launcher, f'--processes={self.processes}', '--', *main]
    flags = [f'--config.{name}={value}' for name, value in settings.items()]
    return [sys.executable, *self.wrapper, *main, *flags]

  def start(self, stderr: int = subprocess.PIPE) -> subprocess.Popen:
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'PYTHONFAULTHANDLER': '1',
      'JAX_COMPILATION_CACHE_DIR': str(self.workdir.parents[1] / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.begun = self.steps()
    return subprocess.Popen(
      self.command,
      stdout=subprocess.DEVNULL,
      stderr=stderr,
      text=True,
      env=environment,
    )

  def wait(self, process: subprocess.Popen, tracebacks: bool = False) -> int:
    """Waits for its end; returns the exit status and logs its stderr.

    `tracebacks` allows one, as of a process whose peer is gone.
    """
    try:
      said = process.communicate(timeout=PATIENCE)[1] or ''
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGABRT)  # prints its stack
      said = process.communicate()[1] or ''
      raise Failure(f'no end after {PATIENCE:.0f} s: {said}') from None
    self.log += said
    if 'Traceback' in said and not tracebacks:
      raise Failure(f'a traceback: {said[said.index("Traceback") :][:2000]}')
    return process.returncode

  def reaches(self, step: int, process: subprocess.Popen) -> bool:
    """Waits for a step that `process` takes; False if the run ended before."""
    step = max(step, min(self.begun + 1, STEPS))
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
    if status or not self.is_finished:
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


def trials(
  root: pathlib.Path,
  number: int,
  seed: int,
  kinds: Sequence[Fault],
  jobs: int = 2,
  together: int = 1,
) -> Iterator[Trial]:
  """Yields trials of the faults in turn, or of `together` drawn ones each.

  Raises:
    Failure: a run without faults does not finish.
  """
  references = _references(root, {fault.like for fault in kinds})

  def one(index):
    clock, chance = time.monotonic(), random.Random(f'{seed} {index}')
    drawn = [kinds[index % len(kinds)]]
    if together > 1:
      plain = [fault for fault in kinds if fault.like == 'plain']
      drawn = [chance.choice(plain) for _ in range(together)]
    name = '+'.join(fault.name for fault in drawn)
    done = []
    place, like = root / f'{index:03d}-{name}', drawn[0].like
    run = Run(place / 'run', _text(root, like))
    spent = None
    try:
      for fault in drawn:
        if not run.is_finished:  # another fault's run may be
          done.append(fault.do(run, chance))
      said = '; '.join(done)
      run.finish()
      whole = all(fault.keeps_records for fault in drawn)
      compare(run.outcome(), references[like], whole=whole)
      survived, spent = True, timeline.goodput(run.workdir)
      shutil.rmtree(place)
    except Failure as failure:
      said, survived = str(failure), False
    seconds = time.monotonic() - clock
    if spent is None:
      return Trial(name, index, survived, seconds, said)
    lost = sum(spent['lost_steps'].values())
    return Trial(name, index, survived, seconds, said, spent['share'], lost)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    yield from pool.map(one, range(number))


def _text(root, like):
  return root / ('poisoned.txt' if like == 'nan' else 'text.txt')


def _references(root, likes):
  """Outcomes of the undisturbed runs."""
  root.mkdir(parents=True, exist_ok=True)
  write_texts(root)
  found = {}
  for like in sorted(likes):
    run = Run(root / f'reference-{like}' / 'run', _text(root, like))
    if like == 'nan':
      run.wrapper = (str(FAULTS), 'nan')
    run.processes = 2 if like == 'two' else 1
    run.finish()
    found[like] = run.outcome()
  return found


def write_texts(root: pathlib.Path):
  words = np.random.default_rng(0).choice(['ab ', 'cde ', 'f\n'], 6000)
  (root / 'text.txt').write_text(''.join(words))
  words[[1000, 2000, 3000]] = '\x01'
  (root / 'poisoned.txt').write_text(''.join(words))


def compare(got, want, *, whole: bool = True):
  """Raises Failure unless all lines (if `whole`) and the state are the same."""
  (lines, state), (want_lines, want_state) = got, want
  known = {line['step']: line for line in want_lines}
  for line in lines:
    if line != known.get(line['step']):
      raise Failure(f'step differs: {line}, not {known.get(line["step"])}')
  if whole and [x['step'] for x in lines] != [x['step'] for x in want_lines]:
    raise Failure(f'{len(lines)} steps, not {len(want_lines)}')
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state),
    jax.tree.leaves(want_state),
    strict=True,
  ):
    if not np.array_equal(a, b):
      raise Failure(f'{jax.tree_util.keystr(path)} differs')


def goodput_under(
  root: pathlib.Path, seconds: float, every: float, seed: int
) -> dict[str, Any]:
  """Kills a run every so many seconds; returns where its time went."""
  root.mkdir(parents=True, exist_ok=True)
  write_texts(root)
  run, chance = Run(root / 'run', root / 'text.txt'), random.Random(seed)
  run.settings = {'num_steps': 10**7, 'checkpoint_every': 100, 'probe_every': 0}
  number, end = signal.SIGTERM, time.monotonic() + seconds
  while time.monotonic() < end:
    process = run.start()
    time.sleep(min(every, max(1.0, end - time.monotonic())))
    if time.monotonic() < end:
      number = chance.choice([signal.SIGTERM, signal.SIGKILL])
    else:
      number = signal.SIGTERM  # so that the last start says what it did
    process.send_signal(number)
    run.wait(process)
  return timeline.goodput(run.workdir) | {'steps': run.steps()}
