"""Signals and time: a run that is told to end saves, and goes on the same."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mhc.runtime import files
from mhc.runtime import multihost
from mhc.runtime import preemption


def test_a_signal_asks_and_a_second_one_ends(capfd):
  before = signal.getsignal(signal.SIGTERM)
  with preemption.StopSignal() as asked:
    assert asked.stopping(3) is None
    os.kill(os.getpid(), signal.SIGTERM)
    stopped = asked.stopping(4)
    assert str(stopped) == 'SIGTERM: saved after step 4'
    assert stopped.status is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGTERM) == before
  assert 'a second signal ends at once' in capfd.readouterr().err
  with preemption.StopSignal() as asked:
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.stopping(1).status == 130


def test_the_time_is_up():
  with preemption.StopSignal(time.monotonic() + 0.05) as asked:
    assert asked.stopping(1) is None
    time.sleep(0.06)
    assert str(asked.stopping(2)) == 'the time is up: saved after step 2'


@pytest.mark.parametrize(
  ('text', 'seconds'),
  [('90', 90), ('2.5m', 150), ('1h30m', 5400), ('10s', 10), ('1h1m1s', 3661)],
)
def test_times(text, seconds):
  assert preemption.seconds(text) == seconds


@pytest.mark.parametrize('text', ['', 'soon', '5 min', '-3', '0', '3d'])
def test_no_times(text):
  with pytest.raises(ValueError, match='time'):
    preemption.seconds(text)


def test_many_processes_hear_of_it_by_jax(monkeypatch, capfd):
  told, kill = [], os.kill
  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(multihost, 'count', lambda: 2)
  monkeypatch.setattr(multihost, 'stopping', lambda step: step == 5)
  monkeypatch.setattr(os, 'kill', lambda *what: told.append(what))
  with preemption.StopSignal(time.monotonic() - 1) as asked:
    assert asked.stopping(4) is None
    assert signal.getsignal(signal.SIGTERM) == before
    assert asked.stopping(5).step == 5
    # While it saves: one may be the first in this process, a second is not.
    kill(os.getpid(), signal.SIGTERM)
    assert 'a second signal ends at once' in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    assert asked.stopping(5).step == 5
  assert signal.getsignal(signal.SIGTERM) == before
  # Once, and to itself: JAX tells the others.
  assert told == [(os.getpid(), signal.SIGTERM)]


FLAGS = (
  '--config.num_steps=4000',
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.data.seq_len=16',
  '--config.data.batch_size=4',
  '--config.eval_sequences=4',
  '--config.eval_every=0',
  '--config.probe_every=0',
  '--config.checkpoint_every=0',
)


def steps(workdir):
  return [line['step'] for line in files.read_lines(workdir / 'metrics.jsonl')]


def test_a_run_that_is_told_to_end(launch, text, tmp_path):
  workdir = tmp_path / 'run'
  flags = (f'--workdir={workdir}', f'--config.data.path={text}', *FLAGS)
  command = [sys.executable, 'launch/train.py', *flags]
  run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 120
  while len(steps(workdir)) < 20:
    assert time.monotonic() < deadline
    assert run.poll() is None
    time.sleep(0.01)
  before = len(steps(workdir))
  run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=60)
  assert run.returncode == 0
  last = steps(workdir)[-1]
  assert f'SIGTERM: saved after step {last}. The same command' in error
  assert 'Traceback' not in error
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == [str(last)]
  # Within a step of the signal; some are made before it arrives.
  assert last - before < 1000
  done = launch(
    'train.py', *flags, '--max_time=1s', '--stop_status=143', '--stop_status=75'
  )
  assert done.returncode == 75, done.stderr
  assert 'the time is up: saved after step' in done.stderr
  assert steps(workdir) == list(range(1, len(steps(workdir)) + 1))
  assert len(steps(workdir)) > last
  done = launch('train.py', *flags, '--max_time=soon')
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert "'soon' is not a time" in done.stderr
