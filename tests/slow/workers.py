"""Three workers, one of them killed, train what one worker trains.

    python tests/slow/workers.py

A comparison of four short runs, once by one worker and once by three processes
that share a folder, of which one is killed with SIGKILL in the middle of a run:
every loss, gradient norm and probe is the same, bit for bit, each run was
finished once, and the report comes out. Then the finished comparison renders
again, alone. About four minutes on two idle cores.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = (
  '--panels=main',
  "--config.panels.main.kinds=('residual','mhc')",
  '--config.panels.main.tuned_on=',
  '--config.panels.main.learning_rates=(0.01,)',
  '--config.panels.main.num_steps=120',
  '--config.base.checkpoint_every=20',
)


def command(workdir, *more):
  return [
    *(sys.executable, str(ROOT / 'launch' / 'compare.py')),
    *(f'--config={ROOT / "configs" / "smoke.py"}', f'--workdir={workdir}'),
    *(*SETTINGS, *more),
  ]


def records(workdir) -> dict[str, list[str]]:
  """Each run's metrics without times, and its probes."""
  found = {}
  for file in sorted(workdir.glob('main/*/*.jsonl')):
    if file.name in ('metrics.jsonl', 'probes.jsonl'):
      lines = map(json.loads, file.read_text().splitlines())
      found[f'{file.parent.name}/{file.name}'] = [
        json.dumps({k: v for k, v in line.items() if 'time/' not in k})
        for line in lines
      ]
  return found


def kill_in_a_run(worker, workdir):
  """Kills `worker` when it has written some steps of a run."""
  while worker.poll() is None:
    for file in workdir.glob('main/*/metrics.jsonl'):
      steps = file.read_bytes().count(b'\n')
      done = (file.parent / 'summary.json').exists()
      if steps > 30 and not done and _holds(workdir, file.parent.name, worker):
        worker.send_signal(signal.SIGKILL)
        return file.parent.name
    time.sleep(0.05)
  raise AssertionError('the worker has ended before it could be killed')


def _holds(workdir, run, worker):
  claims = sorted(workdir.glob(f'leases/*{run}.*'))
  return bool(claims) and f'{worker.pid}' in claims[-1].read_text()


def main():
  with tempfile.TemporaryDirectory() as folder:
    alone, shared = pathlib.Path(folder, 'alone'), pathlib.Path(folder, 'three')
    subprocess.run(command(alone), check=True, stderr=subprocess.DEVNULL)
    workers = [subprocess.Popen(command(shared)) for _ in range(3)]
    killed = kill_in_a_run(workers[0], shared)
    print(f'killed a worker in {killed}', flush=True)
    statuses = [worker.wait() for worker in workers]
    assert statuses == [-signal.SIGKILL, 0, 0], statuses
    assert records(alone) == records(shared)
    assert len(records(shared)) == 8  # two files of four runs
    results = json.loads((shared / 'results.json').read_text())
    assert len(results['rows']) == 4
    start = time.monotonic()
    subprocess.run(command(shared), check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    print(f'the same; the finished comparison rendered in {seconds:.0f} s')


if __name__ == '__main__':
  main()
