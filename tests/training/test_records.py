"""The records of a run, when their files or states are not what they were."""

import dataclasses
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from mhc import config as config_lib
from mhc.runtime import json_lines
from mhc.training import records as records_lib
from mhc.training import tensorboard
from mhc.training import wandb

CONFIG = config_lib.Config(checkpoint_every=4)


def run(workdir, steps, resume=None, config=CONFIG):
  """Records of a run that takes steps; what a state after the last holds."""
  records = records_lib.Records(config, workdir)
  records.event(0, guard='early')
  first = steps[0] - 1
  records.open(first, resume)
  for step in steps:
    records.metrics(step, {'loss/train': 1.0 / step})
  records.probe(steps[-1], {'mean': 1.0})
  positions = records.positions()
  records.close()
  return positions


def read(workdir, name):
  return [x['step'] for x in json_lines.read_lines(workdir / f'{name}.jsonl')]


def test_a_resumed_run_continues_what_was_saved(tmp_path, capsys):
  saved = run(tmp_path, range(1, 5))
  run(tmp_path, range(5, 8), saved)  # killed before it is saved
  run(tmp_path, range(5, 7), saved)
  assert read(tmp_path, 'metrics') == [1, 2, 3, 4, 5, 6]
  assert read(tmp_path, 'probes') == [4, 6]
  assert read(tmp_path, 'events') == [0, 0]
  assert capsys.readouterr().err == ''


def test_lost_lines_are_an_event(tmp_path, capsys):
  saved = run(tmp_path, range(1, 5))
  (tmp_path / 'probes.jsonl').unlink()
  run(tmp_path, range(5, 7), saved)
  assert 'probes.jsonl is gone, and with it 1 line' in capsys.readouterr().err
  events = json_lines.read_lines(tmp_path / 'events.jsonl')
  (lost,) = [e for e in events if e['guard'] == 'records']
  assert lost['step'] == 4
  assert 'probes.jsonl' in lost['metric']


@pytest.mark.parametrize('last', [3, 4, 9])
def test_records_without_a_state_are_kept(last, tmp_path, capsys):
  """Nobody has lost anything before the first state was due."""
  run(tmp_path, range(1, last + 1))
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  run(tmp_path, range(1, 3))
  assert read(tmp_path, 'metrics') == [1, 2]
  said, kept = capsys.readouterr().err, tmp_path / 'metrics.jsonl.old'
  if last < CONFIG.checkpoint_every:
    assert not said
    assert not kept.exists()
  else:
    assert f'shows step {last}, but {tmp_path} has no checkpoint' in said
    assert kept.read_bytes() == before
    assert (tmp_path / 'probes.jsonl.old').exists()


def scalars(folder):
  """The (step, loss) that TensorBoard shows: a start purges later steps."""
  shown = {}
  for file in sorted(folder.iterdir(), key=lambda file: file.name):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = {s: v for s, v in shown.items() if s < event.step}
      for value in event.summary.value:
        shown.setdefault(event.step, []).append(value.simple_value)
  return shown


def test_tensorboard_shows_each_step_once(tmp_path):
  config = dataclasses.replace(CONFIG, tensorboard=True)
  saved = run(tmp_path, range(1, 5), config=config)
  run(tmp_path, range(5, 9), saved, config)
  run(tmp_path, range(5, 7), saved, config)
  shown = scalars(tmp_path / 'tensorboard')
  assert list(shown) == [1, 2, 3, 4, 5, 6]
  assert all(len(values) == 1 for values in shown.values())


def test_tensorboard_on_a_full_disk_holds_nothing_up(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(tensorboard, 'FLUSH_S', 0)
  board = tensorboard.TensorBoard(tmp_path / 'tensorboard', 0)
  board.write(1, {'loss': 1.0})

  def full(*_):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(board._writer, 'flush', full)
    patch.setattr(tensorboard.TensorBoard, '_open', full)
    for step in range(2, 100):
      board.write(step, {'loss': 1.0})
    assert capsys.readouterr().err.count('NOT WRITTEN') == 1
  board.write(100, {'loss': 1.0})
  board.close()
  shown = scalars(tmp_path / 'tensorboard')
  assert list(shown) == list(range(1, 101))
  assert all(len(values) == 1 for values in shown.values())


def test_wandb_that_fails_costs_the_run_nothing(tmp_path, monkeypatch, capsys):
  fake = types.ModuleType('wandb')
  fake.Settings = lambda **_: None

  def fail(**_):
    raise RuntimeError('no\nnetwork')

  fake.init = fail
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  run(tmp_path, range(1, 4), config=dataclasses.replace(CONFIG, wandb='mhc'))
  assert read(tmp_path, 'metrics') == [1, 2, 3]
  said = capsys.readouterr().err
  assert said == 'NOT WRITTEN: Weights & Biases: no network\n'
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match=r"pip install 'mhc-jax\[wandb\]'"):
    wandb.check()
