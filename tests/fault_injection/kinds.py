"""Kinds of fault: what is done to a run, which must then end as promised.

Each is a function of a run that has not been started, and of chance; it says
what it has done. The harness then starts the run until it is finished.
"""

import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import faults
from harness import PATIENCE
from harness import SAVE_EVERY
from harness import STEPS
from harness import Failure
from harness import Fault
from harness import Run

from mhc.runtime import json_lines


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
  if run.is_finished:
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
    _until_saved(run, 2)
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
  """A tmpfs of 16 MB is full for a while, with TensorBoard: it goes on."""
  before = run.workdir.with_name(run.workdir.name + '-before')
  if run.workdir.exists():  # another fault's
    run.workdir.rename(before)
  run.workdir.mkdir(parents=True)
  run.settings = {'tensorboard': True}
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', str(run.workdir)]
  mounted = (
    shutil.which('mount')
    and not subprocess.run(mount, capture_output=True, check=False).returncode
  )
  try:
    if not mounted:
      raise Failure('no permission to mount a tmpfs: run as root')
    if before.exists():
      shutil.copytree(before, run.workdir, dirs_exist_ok=True)
      shutil.rmtree(before)
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


def terminated_twice(run: Run, chance: random.Random) -> str:
  """Two SIGTERMs, 10 ms apart, as supervisors send them: one request."""
  return _asked(run, chance, signal.SIGTERM, signal.SIGTERM)


def hung_up(run: Run, chance: random.Random) -> str:
  """SIGHUP, as of a terminal that is closed, and a SIGTERM with it."""
  return _asked(run, chance, signal.SIGHUP, signal.SIGTERM)


def _asked(run, chance, *numbers):
  process = run.start()
  run.reaches(chance.randrange(1, STEPS - 60), process)
  for number in numbers:
    if process.poll() is None:
      process.send_signal(number)
    time.sleep(0.01)
  status, last = run.wait(process), run.steps()
  if run.is_finished:
    return 'it was finished already'
  if status or run.saved()[0] != last:
    raise Failure(f'status {status}, after {last} saved {run.saved()}')
  return f'saved after step {last}'


def terminated_at_start(run: Run, chance: random.Random) -> str:
  """SIGTERM within the first seconds: while it imports, reads, compiles."""
  process, delay = run.start(), chance.uniform(0.2, 8)
  time.sleep(delay)
  process.terminate()
  status = run.wait(process)
  # Before Python's first second there is nobody to ask.
  if status not in (0, -signal.SIGTERM):
    raise Failure(f'SIGTERM after {delay:.1f} s: status {status}: {run.log}')
  return f'after {delay:.1f} s, status {status}'


def suspended(run: Run, chance: random.Random) -> str:
  """SIGSTOP for seconds, and on; then a SIGKILL."""
  process = run.start()
  run.reaches(chance.randrange(1, STEPS - 60), process)
  process.send_signal(signal.SIGSTOP)
  time.sleep(chance.uniform(0.5, 3))
  process.send_signal(signal.SIGCONT)
  run.reaches(min(STEPS - 2, run.steps() + 10), process)
  process.kill()
  run.wait(process)
  return f'killed in step {run.steps()}'


def started_twice(run: Run, chance: random.Random) -> str:
  """A second start in the folder of a run that trains: it is refused."""
  process = run.start()
  if not run.reaches(chance.randrange(1, STEPS // 2), process):
    run.wait(process)
    return 'it was finished already'
  os.kill(process.pid, signal.SIGSTOP)  # so that it is not finished meanwhile
  try:
    status = run.wait(run.start())
  finally:
    os.kill(process.pid, signal.SIGCONT)
  if status != 2 or f'process {process.pid}' not in run.log:
    raise Failure(f'the second start ended with status {status}: {run.log}')
  if status := run.wait(process):
    raise Failure(f'the first start ended with status {status}: {run.log}')
  return 'refused'


def unheard(run: Run, chance: random.Random) -> str:
  """Nobody reads what it says: a broken pipe, or a full device."""
  if chance.random() < 0.5:
    reader, writer = os.pipe()
    os.close(reader)
  else:
    writer = os.open('/dev/full', os.O_WRONLY)
  try:
    process = run.start(stderr=writer)
  finally:
    os.close(writer)
  if status := run.wait(process):
    raise Failure(f'ended with status {status}')
  return 'finished'


def _stopped(run, chance):
  """Stops a run that has a state, and has steps to go."""
  process = run.start()
  run.reaches(chance.randrange(SAVE_EVERY + 4, STEPS - 60), process)
  process.send_signal(chance.choice([signal.SIGTERM, signal.SIGKILL]))
  run.wait(process)
  _until_saved(run, 1)


def _until_saved(run, number):
  """Starts a run until it has as many states: saves lag behind its steps."""
  while len(run.saved()) < number:
    process = run.start()
    run.reaches(run.steps() + SAVE_EVERY, process)
    process.kill()
    run.wait(process)


def lost_records(run: Run, chance: random.Random) -> str:
  """Records that are gone, cut or altered: told, kept aside; it goes on."""
  _stopped(run, chance)
  name = chance.choice(['metrics', 'probes'])
  file = run.workdir / f'{name}.jsonl'
  how = chance.choice(['deleted', 'cut', 'flipped', 'emptied'])
  whole = file.read_bytes()
  if how == 'deleted':
    file.unlink()
  else:
    part = whole[: chance.randrange(1, 40)] if how == 'cut' else b''
    if how == 'flipped':
      part = bytes([whole[0] ^ 1]) + whole[1:]
    file.write_bytes(part)
  run.log = ''
  run.finish()
  if 'RECORDS LOST' not in run.log or file.name not in run.log:
    raise Failure(f'{file.name} {how}, and nothing said: {run.log}')
  if how in ('cut', 'flipped') and not file.with_suffix('.jsonl.old').exists():
    raise Failure(f'{file.name} {how}, and not kept')
  return f'{file.name} {how}'


def lost_states(run: Run, chance: random.Random) -> str:
  """All checkpoints are gone: told, and it begins again."""
  _stopped(run, chance)
  shutil.rmtree(run.workdir / 'checkpoints')
  run.log = ''
  run.finish()
  if 'NO STATE' not in run.log:
    raise Failure(f'states lost, and nothing said: {run.log}')
  if not (run.workdir / 'metrics.jsonl.old').exists():
    raise Failure('the earlier records were not kept')
  return 'begun again'


def other_text(run: Run, chance: random.Random) -> str:
  """The text changes between stop and resume: refused, until it is back."""
  mine = run.workdir.with_name('text.txt')
  mine.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(run.text, mine)
  run.text = mine
  _stopped(run, chance)
  whole = mine.read_text()
  mine.write_text(whole + 'ab ' if chance.random() < 0.5 else whole[:-4])
  status = run.wait(run.start())
  if status != 2 or 'has changed since it began' not in run.log:
    raise Failure(f'on another text: status {status}: {run.log}')
  mine.write_text(whole)
  return 'refused'


def orphaned(run: Run, chance: random.Random) -> str:
  """SIGKILL of the launcher of two processes: they end, and resume."""
  run.processes = 2
  process = run.start()
  run.reaches(chance.randrange(1, STEPS - 60), process)
  children = _children(process.pid)
  process.kill()
  deadline = time.monotonic() + PATIENCE
  while any(map(_runs, children)):
    if time.monotonic() > deadline:
      raise Failure('its processes train on without it')
    time.sleep(0.05)
  run.wait(process)
  return f'in step {run.steps()}'


def _runs(process):
  """Whether a process is there, and not a zombie that nobody waits for."""
  try:
    stat = pathlib.Path(f'/proc/{process}/stat').read_text()
  except OSError:
    return False
  return stat.rpartition(')')[2].split()[0] != 'Z'


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


ALL = {
  fault.name: fault
  for fault in itertools.chain(
    map(
      Fault,
      (
        *(killed, killed_at_start, killed_in_save, suspended),
        *(terminated, terminated_twice, terminated_at_start, hung_up),
        *(truncated, flipped, full_disk, clock_jump, unheard),
        *(started_twice, lost_states, other_text),
      ),
    ),
    [
      Fault(lost_records, keeps_records=False),
      Fault(nan_batch, like='nan'),
      Fault(one_of_two, like='two'),
      Fault(orphaned, like='two'),
    ],
  )
}
