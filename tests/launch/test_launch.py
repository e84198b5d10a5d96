"""The mains as a user runs them: one line and exit code 2 on a mistake."""

import contextlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from mhc.runtime import cli
from mhc.runtime import phases

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
  '--config.num_steps=4',
  '--config.optimizer.warmup_steps=1',
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.model.connection.sinkhorn_iters=3',
  '--config.data.seq_len=16',
  '--config.data.batch_size=2',
  '--config.eval_sequences=4',
)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(0)
  for number in range(30):
    words = rng.choice(['ab ', 'cde ', 'f\n'], 300)
    (folder / f'{number}.txt').write_text(''.join(words))
  return folder


def refused(result, *needles):
  assert result.returncode == 2, result.stderr
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1, result.stderr
  assert re.match('error( in process [0-9]+)?: ', lines[0])
  for needle in needles:
    assert needle in lines[0]


def test_train_then_evaluate(launch, text, tmp_path):
  workdir = f'--workdir={tmp_path / "run"}'
  result = launch('train.py', workdir, f'--config.data.path={text}', *SMALL)
  assert result.returncode == 0, result.stderr
  assert 'bits per byte' in result.stdout
  assert '100%' in result.stderr
  assert 'checkpoint' not in result.stderr  # no log lines of libraries
  result = launch('evaluate.py', workdir)
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout)['step'] == 4
  other = launch('evaluate.py', workdir, f'--path={text / "0.txt"}')
  assert json.loads(other.stdout)['corpus'].endswith('0.txt')
  table = launch('dissect.py', workdir, '--rows=4', cold=True)
  assert table.returncode == 0, table.stderr
  assert re.search(r'\n\| H_res := I \| [0-9.]+ \| [+-]0', table.stdout)
  # The same folder for another model: refused.
  result = launch(
    'train.py',
    workdir,
    f'--config.data.path={text}',
    *SMALL,
    '--config.model.connection.kind=hc',
  )
  refused(result, "kind='mhc'", "'hc'", 'choose another --workdir')


def test_prepare_then_train_then_sample(launch, text, tmp_path):
  """Learned words, memory-mapped tokens, a checkpoint, text."""
  out, workdir = tmp_path / 'tokens', f'--workdir={tmp_path / "run"}'
  given = (f'--path={text}', f'--out={out}', '--tokenizer=train:280')
  result = launch('prepare_data.py', *given, cold=True)
  assert result.returncode == 0, result.stderr
  assert '30 documents' in result.stdout
  data = f'--config.data.path={out}'
  small = [*SMALL, '--config.model.moe.num_experts=0']
  result = launch('train.py', workdir, data, *small)
  assert result.returncode == 0, result.stderr
  assert 'by formula' in result.stderr
  assert 'by XLA' in result.stderr
  drawn = ('--prompt=ab cd', '--num_tokens=8')
  result = launch('sample.py', workdir, *drawn, cold=True)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('ab cd')
  several = launch('sample.py', workdir, *drawn, '--num_samples=3')
  assert several.stdout.count('--- ') == 3
  refused(launch('sample.py', workdir, '--top_p=0'), 'top_p=0')
  fewer = '--config.model.vocab_size=258'
  refused(
    launch('train.py', f'--workdir={tmp_path / "b"}', data, *SMALL, fewer),
    'vocab_size=258',
  )


PER_TOKEN = ['--config.model.moe.experts_per_token=3']
MISTAKES = {
  'unknown key': (
    ['--config.model.num_block=3'],
    ["'config.model.num_block'", "did you mean 'config.model.num_blocks'?"],
  ),
  'unknown flag': (['--workdri=x'], ["'workdri'", "'workdir'"]),
  'no streams': (
    ['--config.model.connection.num_streams=0'],
    ['num_streams=0', 'at least 1'],
  ),
  'no kernel for the width': (
    [
      '--config.model.connection.implementation=pallas',
      '--config.model.dim=96',
    ],
    ["implementation='pallas'", 'width 96', 'multiples of 128'],
  ),
  'wrong type': (['--config.num_steps=ten'], ['num_steps', 'ten']),
  'unknown kind': (
    ['--config.model.connection.kind=mch'],
    ["'mch'", "did you mean 'mhc'?"],
  ),
  'no config file': (['--config=nowhere.py'], ['nowhere.py', 'smoke']),
  'stray argument': (['num_steps=3'], ["'num_steps=3'"]),
  'missing data': (['--config.data.path=/nowhere'], ['/nowhere', 'no file']),
  'empty data': (['--config.data.path={empty}'], ['empty']),
  'short data': (['--config.data.path={short}'], ['seq_len=64', 'tokens']),
  'not text': (['--config.data.path={binary}'], ['not UTF-8', 'byte 3']),
  'more choices than experts': (
    ['--config.model.moe.num_experts=2', *PER_TOKEN],
    ['experts_per_token=3', 'num_experts=2'],
  ),
  'no capacity': (
    ['--config.model.moe.capacity_factor=0'],
    ['capacity_factor=0', 'positive'],
  ),
  'too many devices': (
    ['--config.mesh.num_devices=3', '--config.data.batch_size=3'],
    ['num_devices=3', '1 cpu'],
  ),
  'half of where the others are': (
    ['--coordinator=localhost:1', '--process_id=1'],
    ['required together', 'add --num_processes'],
  ),
  'the others in two ways': (
    ['--distributed', '--num_processes=2'],
    ['--distributed', 'do not combine'],
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_end_in_one_line(launch, tmp_path, mistake):
  files = {
    name: tmp_path / f'{name}.txt' for name in ('empty', 'short', 'binary')
  }
  files['empty'].write_text('')
  files['short'].write_text('too short')
  files['binary'].write_bytes(b'abc\xff')
  arguments, needles = MISTAKES[mistake]
  workdir = tmp_path / 'run'
  result = launch(
    'train.py',
    f'--workdir={workdir}',
    *(argument.format(**files) for argument in arguments),
  )
  refused(result, *needles)
  assert not workdir.exists()


def test_what_a_flagfile_holds_is_as_if_typed(launch, tmp_path):
  own = tmp_path / 'own.py'
  own.write_text(
    'import neighbour\ndef get_config():\n  return neighbour.made()\n'
  )
  (tmp_path / 'neighbour.py').write_text(
    'import runpy\ndef made():\n  return runpy.run_path('
    f'{str(ROOT / "configs" / "tiny.py")!r})["get_config"]()\n'
  )
  file = tmp_path / 'flags'
  run = f'--workdir={tmp_path / "run"}'
  file.write_text(f'--config={own}\n--config.num_stepz=3\n')
  refused(launch('train.py', run, f'--flagfile={file}'), "'config.num_steps'?")
  file.write_text(f'--config={own}\n--config.num_steps=0\n')
  refused(launch('train.py', run, f'--flagfile={file}'), 'num_steps=0')
  compare = f'--config={ROOT / "configs" / "smoke.py"}'
  file.write_text(f'{compare}\n--config.panels.main.seed=(1,)\n')
  refused(launch('compare.py', run, f'--flagfile={file}'), 'panels.main.seeds')
  refused(launch('train.py', run, '--flagfile=/nowhere'), '/nowhere')
  own.write_text('import nothing_of_that_name\n')
  refused(
    launch('train.py', run, f'--config={own}'), f'{own} fails', 'nothing_of'
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'error',
  [
    MemoryError('Unable to allocate 3 GiB'),
    RuntimeError("can't start new thread"),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: allocating 99 bytes'),
  ],
)
def test_want_of_memory_is_one_line_that_says_what_for(error, capsys):
  with contextlib.suppress(type(error)), phases.phase('reading the data'):
    raise error
  assert cli._explain(error) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: out of memory while reading the data: ')
  assert said.count('\n') == 1


STRANDED = """
import pathlib
import sys
sys.path.insert(0, {launch!r})
import orbax.checkpoint as ocp
from mhc.runtime import cli

def main():
  folder = pathlib.Path({folder!r})
  manager = ocp.CheckpointManager(folder)
  folder.rmdir()
  folder.write_text('in the place of a folder')
  try:
    manager.save(1, args=ocp.args.StandardSave({{'a': 1}}))
    manager.wait_until_finished()
  except OSError as error:
    raise {raised}
  print('saved?')

cli.run(main)
"""


@pytest.mark.parametrize(
  ('raised', 'status', 'said'),
  [
    ("ValueError('not saved') from error", 2, 'error: not saved'),
    ("RuntimeError('a bug') from error", 1, 'RuntimeError: a bug'),
  ],
)
def test_threads_of_a_failed_save_are_not_waited_for(
  tmp_path, raised, status, said
):
  script = STRANDED.format(
    launch=str(ROOT / 'launch'), folder=str(tmp_path / 'states'), raised=raised
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert result.returncode == status, result.stderr
  assert result.stderr.strip().endswith(said)


def test_the_other_mains_refuse_alike(launch, tmp_path):
  empty = f'--workdir={tmp_path}'
  refused(launch('evaluate.py', empty), 'holds no run')
  refused(launch('dissect.py', empty), 'holds no run')
  refused(launch('compare.py', empty, '--report_only'), 'holds no comparison')
  refused(
    launch('compare.py', empty, '--config.panels.quality.seed=(1,)'),
    'config.panels.quality.seeds',
  )
  refused(launch('train.py'), 'workdir')
  refused(launch('aot.py'), '--count')
  refused(launch('aot.py', '--topology=v5p:2x'), "'v5p:2x'", 'v6e:4x4')
  refused(launch('sample.py', empty), 'holds no run')
  out = f'--out={tmp_path}/out'
  is_there = importlib.util.find_spec('lm_eval')
  why = 'holds no run' if is_there else "pip install 'mhc-jax[eval]'"
  refused(launch('harness.py', empty, out), why)
  refused(launch('harness.py', '--workdir=a,gs:///b', out), '=gs:///b names no')
  refused(
    launch('prepare_data.py', '--path=/nowhere', f'--out={tmp_path}/new'),
    '/nowhere',
  )
  ladder = f'--config={ROOT / "configs" / "ladder.py"}:2m'
  refused(launch('compare.py', empty, ladder), "'2m'", "'3m'")


def test_counts_are_printed_as_json(launch, tmp_path):
  config = ROOT / 'configs' / 'paper_3b.py'
  result = launch('aot.py', f'--config={config}', '--count')
  assert json.loads(result.stdout)['connection_params'] == 2949768
  named = ('--config', 'paper_3b:residual')  # from any folder
  plain = launch('aot.py', *named, '--count', cwd=tmp_path)
  assert json.loads(plain.stdout)['connection_params'] == 0


def test_bench_knows_its_parts(launch):
  refused(launch('bench.py', 'kernel'), "'kernel'", "'recompute'")
  refused(launch('bench.py', 'recompute', 'more'), "'more'")


def test_bench_prints_ratios(launch):
  result = launch(
    'bench.py', '--json', '--tokens=64', '--widths=16', '--rounds=2'
  )
  assert result.returncode == 0, result.stderr
  rows = [json.loads(line) for line in result.stdout.splitlines()]
  assert {(row['op'], row['direction']) for row in rows} == {
    (op, direction)
    for op in ('sinkhorn', 'site hc', 'site mhc', 'site identity')
    for direction in ('forward', 'forward+backward')
  }
  assert all(row['ratio_to_copy'] > 0 for row in rows)
