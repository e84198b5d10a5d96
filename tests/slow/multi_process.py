"""Compares several processes with one, on a mesh of all three axes.

    python tests/slow/multi_process.py

Trains mHC with experts for 20 steps on data 2 x pipe 2 x expert 2 devices that
belong to one, two and four processes; all losses and gradient norms must be
within 1e-5 of the one process's. From the checkpoint that two processes saved
half-way, four resume on another mesh and one on yet another, to the same
losses. Then Gloo's psum_scatter is compared with numpy, and SIGTERM must end in
a checkpoint. One line per check, exit status 1 if one fails; about ten minutes
on two cores. tests/runtime/test_multihost.py does less.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if '--scatter' not in sys.argv:
    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import numpy as np

from mhc import config
from mhc.config import dicts
from mhc.runtime import json_lines
from mhc.training import checkpoint
from mhc.training import run
from mhc.training import workdir as workdir_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUND = 1e-5
TINY = dict(
  model=dict(
    num_blocks=2,
    dim=16,
    ffn_dim=16,
    attention=dict(num_heads=1, head_dim=8, rope_dim=4, kv_rank=8),
    connection=dict(num_streams=2, sinkhorn_iters=3),
  ),
  optimizer=dict(warmup_steps=2),
  data=dict(seq_len=16, batch_size=8, microbatch_size=1),
  eval_sequences=8,
  final_sequences=8,
)


def write_text(folder: pathlib.Path) -> dict:
  """Writes a text to learn; returns the settings that use it."""
  words = np.random.default_rng(0).choice(['ab ', 'cde ', 'f\n'], 4000)
  (folder / 'book.txt').write_text(''.join(words))
  return dict(data=dict(path=str(folder / 'book.txt')))


def merge(*changes: dict) -> dict:
  """Merges nested settings, of which the last ones win."""
  merged = {}
  for change in changes:
    for name, value in change.items():
      if isinstance(value, dict):
        value = merge(merged.get(name, {}), value)
      merged[name] = value
  return merged


def start(
  workdir: pathlib.Path, changes: dict, processes: int, devices: int
) -> subprocess.Popen:
  """Starts a run of several processes, through the launcher."""
  settings = [f'--config.{k}={v}' for k, v in dicts.leaves(changes).items()]
  main = ROOT / 'launch' / 'train.py'
  return launch(processes, devices, main, f'--workdir={workdir}', *settings)


def launch(processes: int, devices: int, *command) -> subprocess.Popen:
  launcher = ROOT / 'launch' / 'local_multiprocess.py'
  how = f'--processes={processes}', f'--devices={devices}'
  return subprocess.Popen(
    [sys.executable, launcher, *how, '--', *map(str, command)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen, timeout: float) -> tuple[int, str, str]:
  """Returns exit status, stdout, stderr; ends it after `timeout` seconds."""
  try:
    out, error = process.communicate(timeout=timeout)
  finally:
    for _ in range(2):  # the second one kills
      if process.poll() is None:
        process.terminate()
        time.sleep(0.5)
    process.communicate()  # closes its pipes
  return process.returncode, out, error


def alone(workdir: pathlib.Path, changes: dict):
  """Trains in this process, on its devices."""
  run.train(dicts.replace(config.Config(), **changes), workdir)


def half_way(folder: pathlib.Path, step: int) -> pathlib.Path:
  """Copies a run as it was at its checkpoint of `step`."""
  copy = folder.with_name(folder.name + '-copy')
  shutil.rmtree(copy, ignore_errors=True)
  shutil.copytree(folder, copy)
  (copy / 'summary.json').unlink()
  for other in (copy / 'checkpoints').iterdir():
    if other.name != str(step):
      shutil.rmtree(other)
  return copy


def difference(folder: pathlib.Path, reference: pathlib.Path) -> dict:
  """The largest relative differences of losses and gradient norms, over steps.

  Gains are excluded: they are 1 up to Sinkhorn's residual, which depends on
  parameters whose gradients are rounding errors, and Adam scales those up.
  """
  both = [
    json_lines.read_lines(path / 'metrics.jsonl')
    for path in (folder, reference)
  ]
  assert [line['step'] for line in both[0]] == [
    line['step'] for line in both[1]
  ]
  largest = {}
  for here, there in zip(*both, strict=True):
    assert here.keys() == there.keys()
    for name in here:
      if name.startswith(('loss/', 'grad/')):
        far = abs(here[name] - there[name]) / there[name]
        largest[name] = max(far, largest.get(name, 0.0))
  return largest


def scatter():
  """Checks psum_scatter in one of several processes."""
  given = dict(a.removeprefix('--').split('=') for a in sys.argv if '=' in a)
  jax.distributed.initialize(
    given['coordinator'], int(given['num_processes']), int(given['process_id'])
  )
  mesh = jax.make_mesh(
    (jax.device_count(),), ('all',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('all')
  program = jax.jit(
    jax.shard_map(
      lambda x: jax.lax.psum_scatter(x[0], 'all', tiled=True),
      mesh=mesh,
      in_specs=spec,
      out_specs=spec,
    )
  )
  number = jax.device_count()
  for size in (2**14, 2**18, 2**20):  # floats a device gets: up to 4 MiB
    rows = np.arange(number * number * size, dtype=np.float32) % 251
    rows = rows.reshape(number, number * size)
    placed = jax.make_array_from_callback(
      rows.shape,
      jax.sharding.NamedSharding(mesh, spec),
      lambda index, rows=rows: rows[index],
    )
    for _ in range(5):
      for shard in program(placed).addressable_shards:
        want = rows.sum(axis=0)[shard.index]
        np.testing.assert_array_equal(np.asarray(shard.data), want)


FULL = dict(
  num_steps=20,
  model=dict(num_blocks=4, moe=dict(num_experts=8, num_dense_blocks=0)),
  data=dict(batch_size=16),
  mesh=dict(num_devices=8, pipe=2, expert=2),
  eval_every=10,
  probe_every=10,
  checkpoint_every=10,
)
# (processes, settings) that resume from the checkpoint of two processes.
OTHERS = (
  (4, dict(mesh=dict(pipe=2, expert=4, schedule='1f1b'))),
  (1, dict(mesh=dict(pipe=1, expert=2), data=dict(microbatch_size=2))),
)


def main():
  failed = False

  def report(name, ok, text=''):
    nonlocal failed
    failed |= not ok
    print(f'{"ok" if ok else "FAILED"} {name}: {text}', flush=True)

  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    changes = merge(TINY, FULL, write_text(folder))
    clock = time.perf_counter()

    def compared(name, workdir):
      nonlocal clock
      far = difference(workdir, folder / 'one')
      seconds, clock = time.perf_counter() - clock, time.perf_counter()
      largest = max(far, key=far.get)
      report(
        name,
        far[largest] <= BOUND,
        f'loss within {far["loss/train"]:.1e}, {largest} within '
        f'{far[largest]:.1e}, {seconds:.0f} s',
      )

    def trained(name, workdir, changes, processes):
      if processes == 1:
        alone(workdir, changes)
      else:
        process = start(workdir, changes, processes, 8 // processes)
        status, _, error = finish(process, timeout=900)
        if status:
          report(name, False, f'exit status {status}\n{error}')
          return
      compared(name, workdir)

    trained('one process', folder / 'one', changes, 1)
    for number in (2, 4):
      name = f'{number} processes'
      trained(name, folder / str(number), changes, number)
    for number, other in OTHERS:
      copy = half_way(folder / '2', 10)
      name = f'from the checkpoint of 2, {number} with {other}'
      trained(name, copy, merge(changes, other), number)

    process = launch(2, 2, __file__, '--scatter')
    status, _, error = finish(process, timeout=300)
    report('psum_scatter', status == 0, error if status else '')

    workdir = folder / 'stopped'
    long = merge(TINY, write_text(folder), dict(num_steps=5000))
    process = start(workdir, long, 2, 1)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
      if len(json_lines.read_lines(workdir / 'metrics.jsonl')) > 20:
        break
      time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process, timeout=60)
    config = workdir_lib.read_config(workdir)
    with checkpoint.Checkpoints(workdir, config, reading=True) as saved:
      step = saved.steps()[0]
    said = f'SIGTERM: saved after step {step}.' in error
    report('SIGTERM', status == 0 and said, f'status {status}, step {step}')
  sys.exit(failed)


if __name__ == '__main__':
  scatter() if '--scatter' in sys.argv else main()
