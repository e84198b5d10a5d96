"""A run: its files, its resumption after kill -9, and its evaluation."""

import asyncio
import dataclasses
import gzip
import json
import os
import pathlib
import struct
import tempfile
import time

from example_configs import TINY_RUN
import folders
import jax
import numpy as np
import pytest

from mhc.data import rows as rows_lib
from mhc.runtime import files
from mhc.runtime import json_lines
from mhc.runtime import leases
from mhc.runtime import machine
from mhc.runtime import watchdog
from mhc.training import dissect
from mhc.training import evaluate
from mhc.training import guards
from mhc.training import profile
from mhc.training import run
from mhc.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('optax_promotion')

TINY = TINY_RUN


def with_text(text, **changes):
  settings = dataclasses.replace(
    TINY, data=dataclasses.replace(TINY.data, path=text)
  )
  return dataclasses.replace(settings, **changes)


def losses(workdir):
  lines = json_lines.read_lines(workdir / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(1, len(lines) + 1))
  return [(line['loss/train'], line['grad/global_norm']) for line in lines]


@pytest.fixture(scope='module')
def finished(text, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  with jax.numpy_dtype_promotion('standard'):
    summary = run.train(with_text(text), workdir)
  return workdir, summary


def test_a_run_leaves_its_record(finished):
  workdir, summary = finished
  lines = json_lines.read_lines(workdir / 'metrics.jsonl')
  assert len(losses(workdir)) == 12
  assert [x['step'] for x in lines if 'loss/heldout' in x] == [6, 12]
  probes = json_lines.read_lines(workdir / 'probes.jsonl')
  assert [probe['step'] for probe in probes] == [0, 5, 10, 12]
  assert np.array(probes[0]['mean']).shape == (2, 4, 4)
  assert np.array(probes[0]['pre_mean']).shape == (2, 4)
  assert summary['heldout_nats'] == lines[-1]['loss/heldout']
  assert summary['tokens'] == 12 * 64
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert lines[-1]['loss/train'] < lines[0]['loss/train']
  assert all(line['time/step_s'] > 0 for line in lines)


def test_a_finished_run_is_not_run_again(finished, text):
  workdir, summary = finished
  before = files.stamp(workdir / 'metrics.jsonl')
  other = with_text(text, tensorboard=True, probe_sequences=4)
  assert run.train(other, workdir) == summary
  assert files.stamp(workdir / 'metrics.jsonl') == before


def test_other_settings_are_refused_and_nothing_is_written(
  finished, text, tmp_path
):
  workdir, _ = finished
  names = folders.names(workdir)
  model = dataclasses.replace(TINY.model, num_blocks=2)
  with pytest.raises(ValueError, match=r'num_blocks=1, this one has 2'):
    run.train(with_text(text, model=model), workdir)
  folders.copy(workdir / 'checkpoints', tmp_path / 'checkpoints')
  with pytest.raises(ValueError, match=r'checkpoints of a run but no config'):
    run.train(with_text(text), tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['checkpoints']
  for name in ('br[1]', 'a*b', 'a\nb', 'caf\udce9'):
    with pytest.raises(ValueError, match=r'choose another.*a link to it'):
      run.train(with_text(text), workdir / name)
  with pytest.raises(ValueError, match='is a file'):
    run.train(with_text(text), workdir / 'summary.json')
  assert folders.names(workdir) == names


def test_a_state_that_cannot_be_gone_on_from(finished, text, tmp_path):
  """It is said, and what was opened for the run is closed."""
  workdir = tmp_path / 'copy'
  folders.copy(finished[0], workdir)
  (workdir / 'summary.json').unlink()
  for state in (workdir / 'checkpoints').iterdir():
    files.delete_tree(state / 'state')
  with (
    leases.take(workdir / 'lock', 'run', leases.Watcher()),
    pytest.raises(ValueError, match=rf'in use by .*process {os.getpid()}'),
  ):
    run.train(with_text(text), workdir)
  policy = asyncio.get_event_loop_policy()
  with pytest.raises(ValueError, match='no intact checkpoint'):
    run.train(with_text(text), workdir)
  assert asyncio.get_event_loop_policy() is policy


def test_held_out_loss_of_a_checkpoint_is_the_recorded_one(finished):
  workdir, summary = finished
  result = evaluate.evaluate_checkpoint(workdir, None, 20)
  assert result['step'] == 12
  np.testing.assert_allclose(
    result['loss/heldout'], summary['heldout_nats'], rtol=1e-6
  )
  # All targets of this text are bytes but for the last document mark.
  np.testing.assert_allclose(
    result['loss/heldout_bits_per_byte'],
    result['loss/heldout'] / np.log(2),
    rtol=0.02,
  )
  whole = evaluate.evaluate_checkpoint(workdir, None, 0)
  assert whole['rows'] > 20
  with pytest.raises(ValueError, match='holds no run'):
    evaluate.evaluate_checkpoint(workdir.parent, None, 0)


def test_a_run_is_dissected_on_one_device(finished):
  workdir, summary = finished
  found = dissect.dissect_checkpoint(workdir, 20)
  trained, *others = found['interventions']
  assert (found['step'], found['rows'], found['kind']) == (12, 20, 'mhc')
  np.testing.assert_allclose(
    trained['nats'], summary['heldout_nats'], rtol=1e-6
  )
  assert len(others) == 8
  for one in others:
    np.testing.assert_allclose(
      one['difference'], one['nats'] - trained['nats'], atol=1e-12
    )
    assert one['standard_error'] >= 0
  with pytest.raises(ValueError, match='holds no run'):
    dissect.dissect_checkpoint(workdir.parent, 20)


def wandb_scalars(workdir):
  """The scalars by step in the files of an offline run of W&B."""
  from wandb.proto import wandb_internal_pb2

  (file,) = workdir.glob('wandb/offline-run-*/*.wandb')
  data, at, record, found = file.read_bytes(), 7, b'', {}
  while at + 7 <= len(data):  # blocks of 32 kB
    if (room := 2**15 - at % 2**15) < 7:
      at += room
      continue
    _, size, kind = struct.unpack('<IHB', data[at : at + 7])
    record += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):  # whole, or the last part
      read = wandb_internal_pb2.Record.FromString(record)
      record = b''
      values = {
        item.key or '/'.join(item.nested_key): json.loads(item.value_json)
        for item in read.history.item
      }
      if values:
        found[int(values['_step'])] = values
  return found


@pytest.mark.on_disk
def test_a_run_that_is_watched(finished, text, tmp_path, monkeypatch, capsys):
  """Copies for TensorBoard and W&B, a profile, and a step that is stuck."""
  monkeypatch.setenv('WANDB_MODE', 'offline')
  workdir, said = tmp_path / 'run', []
  step = guards.Guards.step

  def stuck(self, number, *given):
    if number == 7:
      end = time.monotonic() + 120
      while 'in stuck' not in ''.join(said) and time.monotonic() < end:
        time.sleep(0.2)
        said.append(capsys.readouterr().err)
    return step(self, number, *given)

  monkeypatch.setattr(guards.Guards, 'step', stuck)
  # The profile's end is of a step that may take seconds on a busy machine,
  # and the watchdog would wait for ten times as long.
  monkeypatch.setattr(watchdog, 'FACTOR', 1.0)
  settings = with_text(text, tensorboard=True, wandb='mhc', watchdog_s=0.5)
  run.train(settings, workdir, profiled=profile.Steps(3, 4))
  assert 'STUCK: training has got nowhere for ' in ''.join(said)
  assert 'in stuck' in ''.join(said)
  assert losses(workdir) == losses(finished[0])
  lines = json_lines.read_lines(workdir / 'metrics.jsonl')
  (events,) = (workdir / 'tensorboard').iterdir()
  assert b'loss/heldout' in events.read_bytes()
  copied = wandb_scalars(workdir)
  assert list(copied) == [line['step'] for line in lines]
  for line in lines:
    values = dict(line)
    assert values.items() <= (copied[values.pop('step')] | values).items()
    assert {**values} == {name: copied[line['step']][name] for name in values}
  (trace,) = workdir.glob('profile/plugins/profile/*/perfetto_trace.json.gz')
  assert list(trace.parent.glob('*.xplane.pb'))
  events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  numbers = {
    int(event['args']['step_num'])
    for event in events
    if event.get('name') == profile.STEP
  }
  assert {3, 4} <= numbers <= {3, 4, 5}
  summary = json.loads((workdir / 'summary.json').read_text())
  goodput = summary['goodput']
  assert 0 < goodput['share'] < 1
  assert goodput['starts'] == 1
  assert {'training', 'compiling the step', 'saving', 'evaluating'} <= {
    *goodput['seconds']
  }


def test_gone_on_bit_for_bit(finished, text, tmp_path, monkeypatch, capsys):
  """As after a kill; tests/fault_injection kills, this leaves what would be."""
  uninterrupted, summary = finished
  workdir = tmp_path / 'run'
  folders.copy(uninterrupted, workdir)
  (workdir / 'summary.json').unlink()
  files.delete_tree(workdir / 'checkpoints' / '12')
  metrics = workdir / 'metrics.jsonl'
  *lines, _, _ = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(''.join(lines) + '{"step": 11, "loss/tr')
  (workdir / 'notes.txt').write_text("a user's own")

  there = {**machine.identity(), 'CPU cores': 128}
  with monkeypatch.context() as patch:
    patch.setattr(machine, 'identity', lambda: there)
    resumed = run.train(with_text(text), workdir)
  assert losses(workdir) == losses(uninterrupted)
  told = f'CPU cores: {machine.identity()["CPU cores"]}, now 128'
  assert f'goes on elsewhere ({told})' in capsys.readouterr().err
  (event,) = json_lines.read_lines(workdir / 'events.jsonl')
  assert event['metric'] == told
  assert resumed['heldout_nats'] == summary['heldout_nats']
  probes = [
    json_lines.read_lines(folder / 'probes.jsonl')
    for folder in (workdir, uninterrupted)
  ]
  assert probes[0] == probes[1]


@pytest.mark.on_disk
def test_an_end_that_cannot_be_saved_is_not_one(
  finished, text, tmp_path, monkeypatch, capsys
):
  workdir = tmp_path / 'run'
  folders.copy(finished[0], workdir)
  (workdir / 'summary.json').unlink()
  files.delete_tree(workdir / 'checkpoints' / '12')

  def fail(**_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(tempfile, 'mkdtemp', fail)
  with pytest.raises(OSError, match=r'step 12 could not be saved: make room'):
    run.train(with_text(text), workdir)
  assert not (workdir / 'summary.json').exists()
  assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['8']
  said = capsys.readouterr().err
  assert 'NOT SAVED: the state after step 12: [Errno 28]' in said
  assert 'the last one on disk is 8' in said


def test_a_config_of_another_version_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"num_step": 3}')
  with pytest.raises(ValueError, match=r'config\.json.*num_steps'):
    workdir_lib.read_config(tmp_path)


@pytest.mark.on_disk
def test_what_was_done_before_the_data_ended_is_saved(
  text, finished, tmp_path, monkeypatch
):
  workdir, _ = finished
  rows = rows_lib.Rows.__getitem__

  def damaged(self, index):
    if len(losses(tmp_path / 'run')) == 6:
      raise ValueError('block 3 is damaged')
    return rows(self, index)

  with monkeypatch.context() as patch:
    patch.setattr(rows_lib.Rows, '__getitem__', damaged)
    with pytest.raises(ValueError, match='block 3 is damaged'):
      run.train(with_text(text), tmp_path / 'run')
  saved = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert sorted(saved) == ['4', '6']
  run.train(with_text(text), tmp_path / 'run')
  assert losses(tmp_path / 'run') == losses(workdir)


def test_a_mixture_is_trained_on_and_scored_by_its_parts(
  text, tmp_path, monkeypatch
):
  other = tmp_path / 'other.jsonl'
  lines = (json.dumps({'text': f'{n} ' * 20}) for n in range(200))
  other.write_text('\n'.join(lines))
  settings = with_text('')
  settings = dataclasses.replace(
    settings,
    data=dataclasses.replace(
      settings.data, mixture=(f'{text}=3', f'{other}=1')
    ),
  )
  summary = run.train(settings, tmp_path / 'run')
  sources = summary['corpus']['sources']
  assert [one['weight'] for one in sources] == [0.75, 0.25]
  for one in sources:
    tokens = summary['tokens'] * one['weight']
    assert one['epochs'] == tokens / one['train_tokens']
  last = json_lines.read_lines(tmp_path / 'run' / 'metrics.jsonl')[-1]
  names = pathlib.Path(text).name, 'other.jsonl'
  parts = [last[f'loss/heldout/{name}'] for name in names]
  assert min(parts) < last['loss/heldout'] < max(parts)
  assert last['time/data_wait_s'] >= 0
  result = evaluate.evaluate_checkpoint(tmp_path / 'run', None, 20)
  assert np.isfinite(result['loss/heldout_bits_per_byte'])
