"""Signals and time: a run that is told to end saves, and goes on the same."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mhc.runtime import json_lines
from mhc.runtime import multihost
from mhc.runtime import preemption
from mhc.runtime import signals


def test_a_signal_asks_and_a_second_one_is_the_same_request(capfd):
  before = signal.getsignal(signal.SIGTERM)
  with preemption.StopSignal() as asked:
    assert asked.stopping(3) is None
    for _ in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
    stopped = asked.stopping(4)
    assert str(stopped) == 'SIGTERM: saved after step 4'
    assert stopped.status is None
  assert signal.getsignal(signal.SIGTERM) == before
  assert capfd.readouterr().err.count('SIGTERM: will save') == 1
  with preemption.StopSignal() as asked:
    os.kill(os.getpid(), signal.SIGINT)
    assert asked.stopping(1).status == 130


def test_handlers_within_handlers_are_the_same_ones():
  before = [signal.getsignal(number) for number in signals.REQUESTS]
  with signals.Handlers() as outer, signals.Handlers(), preemption.StopSignal():
    assert signals.Handlers.current() is outer
    os.kill(os.getpid(), signal.SIGHUP)
    assert outer.received == signal.SIGHUP
    with pytest.raises(signals.Ended):
      signals.check()
  assert signals.Handlers.current() is None
  assert [signal.getsignal(number) for number in signals.REQUESTS] == before
  signals.check()


# Processes that get signals; all are forked by one that has imported JAX.
SCENES = """
import hashlib, json, os, signal, sys, time
from mhc.runtime import preemption
from mhc.runtime import signals

def trains():
  with preemption.StopSignal() as asked:
    os.write(ready, b'.')
    for step in range(100):
      time.sleep(0.02)
      if stopped := asked.stopping(step):
        time.sleep(0.3)  # saves
        os._exit(20 if stopped.why == 'SIGTERM' else 21)

def saves_for_long():
  with preemption.StopSignal() as asked:
    os.write(ready, b'.')
    while not asked.stopping(0):
      time.sleep(0.02)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)

def waits():
  os.write(ready, b'.')
  try:
    time.sleep(20)
  except signals.Ended as ended:
    os._exit(30 + ended.number)

def compiles():
  os.write(ready, b'.')  # one call, during which Python runs no handlers
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)

def next_run():
  with preemption.StopSignal():
    os.write(ready, b'.')
    time.sleep(3)  # its last step, after which it does not ask
  try:
    signals.check()
  except signals.Ended:
    os._exit(40)

children = {}
for name, scene, sent in json.loads(sys.argv[1]):
  read, ready = os.pipe()
  child = os.fork()
  if not child:
    if name == 'nohup':
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.Handlers(75):
      globals()[scene]()
    os._exit(99)
  children[name] = child, sent, read
for child, sent, read in children.values():
  os.read(read, 1)
  if os.fork() == 0:
    for wait, number in sent:
      time.sleep(wait)
      os.kill(child, number)
    os._exit(0)
ended = dict(os.wait() for _ in range(2 * len(children)))
status = lambda child: os.waitstatus_to_exitcode(ended[child])
print(json.dumps({name: status(c[0]) for name, c in children.items()}))
"""


def test_when_signals_come():
  term, hup = signal.SIGTERM, signal.SIGHUP
  scenes = [
    ('once', 'trains', [(0.1, term)], 20),
    ('supervisor', 'trains', [(0.1, term), (0.01, term)], 20),
    ('terminal', 'trains', [(0.1, hup), (0.01, hup), (0.01, term)], 21),
    ('nohup', 'trains', [(0.1, hup)], 99),
    ('impatient', 'trains', [(0.1, term), (1.3, term)], 20),
    ('stuck in a save', 'saves_for_long', [(0.1, term), (1.3, term)], 128 + 15),
    ('reading', 'waits', [(0.1, term)], 30 + 15),
    ('reading twice', 'waits', [(0.1, hup), (0.01, hup)], 30 + 1),
    ('compiling', 'compiles', [(0.1, term)], 75),
    ('Ctrl-C while compiling', 'compiles', [(0.1, signal.SIGINT)], 130),
    ('between two runs', 'next_run', [(0.1, term)], 40),
  ]
  result = subprocess.run(
    [sys.executable, '-c', SCENES, json.dumps([s[:3] for s in scenes])],
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout) == {name: end for name, _, _, end in scenes}


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
    assert 'another signal, after 1 s, ends at once' in capfd.readouterr().err
    assert asked.stopping(5).step == 5
  assert signal.getsignal(signal.SIGTERM) == before
  # Once, and to itself: JAX tells the others.
  assert told == [(os.getpid(), signal.SIGTERM)]


FLAGS = (
  '--config.num_steps=4000',
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.model.attention.num_heads=1',
  '--config.model.connection.sinkhorn_iters=3',
  '--config.model.recompute=none',
  '--config.data.seq_len=16',
  '--config.data.batch_size=4',
  '--config.eval_sequences=4',
  '--config.eval_every=0',
  '--config.probe_every=0',
  '--config.checkpoint_every=0',
)


def steps(workdir):
  return [
    line['step'] for line in json_lines.read_lines(workdir / 'metrics.jsonl')
  ]


def test_a_run_that_is_told_to_end(launch, mains, text, tmp_path):
  (_, environment), workdir = mains, tmp_path / 'run'
  flags = (f'--workdir={workdir}', f'--config.data.path={text}', *FLAGS)
  command = [sys.executable, 'launch/train.py', *flags]
  run = subprocess.Popen(
    command, stderr=subprocess.PIPE, text=True, env=environment
  )
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
