"""The way from text to a report with nothing on this machine's disk."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
import time

import bucket_server
import pytest
import quick_compilation

from mhc.interop import safetensors
from mhc.runtime import files
from mhc.runtime import json_lines
from mhc.runtime import paths

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = (
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.model.vocab_size=384',
  '--config.model.attention.num_heads=1',
  '--config.model.attention.head_dim=8',
  '--config.model.attention.rope_dim=4',
  '--config.model.attention.kv_rank=8',
  '--config.model.connection.sinkhorn_iters=3',
  '--config.model.recompute=none',
)
RUN = (
  *MODEL,
  '--config.num_steps=24',
  '--config.optimizer.warmup_steps=4',
  '--config.data.seq_len=16',
  '--config.data.batch_size=4',
  '--config.eval_every=0',
  '--config.eval_sequences=8',
  '--config.final_sequences=8',
  '--config.probe_every=10',
  '--config.probe_sequences=2',
  '--config.checkpoint_every=6',
  '--config.keep_checkpoints=2',
  '--config.tensorboard=True',
)


# What panels do not set themselves.
BASE = (*MODEL[1:], '--config.tensorboard=True')


@pytest.fixture(scope='module')
def store():
  """A bucket whose answers take a while, so that a kill finds a save half."""
  with (
    pytest.MonkeyPatch.context() as patch,
    bucket_server.Bucket(delay_s=0.01) as running,
  ):
    for name, value in running.settings.items():
      patch.setenv(name, value)
    yield running


@pytest.fixture(scope='module')
def folder(store, text):
  """A folder of the bucket, with text in two forms."""
  import gcsfs

  system = gcsfs.GCSFileSystem(
    use_listings_cache=False, skip_instance_cache=True
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(paths, 'filesystem', lambda path: system)
    folder = paths.path(f'{bucket_server.URL}/work')
    words = pathlib.Path(text).read_text().split('\n')
    for number, part in enumerate(words[:60]):
      files.replace(folder / f'texts/{number:02}.txt', f'{number} {part}' * 3)
    records = (json.dumps({'text': f'{n} or so ' * 9}) for n in range(99))
    with files.replacing(folder / 'texts/more.jsonl.gz') as file:
      file.write(gzip.compress('\n'.join(records).encode()))
    files.replace(folder / 'texts/.hidden/x.txt', 'is not text ' * 100)
    yield folder


@pytest.fixture(scope='module')
def environment(store, compiled):
  return store.environment | quick_compilation.environment(compiled)


@pytest.fixture(scope='module')
def run(mains, store, tmp_path_factory):
  """Runs a main to its end, and returns what it printed."""
  forked, _ = mains

  def one(main, *arguments):
    empty = tmp_path_factory.mktemp('cwd')
    command = [ROOT / 'launch' / main, *arguments]
    result = forked.run(command, empty, store.settings)
    assert result.returncode == 0, result.stderr
    assert not [*empty.iterdir()]  # such as one named gs:
    return result.stdout + result.stderr

  return one


def train(folder, name, data='texts'):
  return (
    'train.py',
    f'--workdir={folder}/{name}',
    f'--config.data.path={folder}/{data}',
    *RUN,
  )


@pytest.fixture(scope='module')
def undisturbed(folder, run):
  run(*train(folder, 'undisturbed'))
  return folder / 'undisturbed'


def outcome(workdir):
  lines = json_lines.read_lines(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in line.items() if not k.startswith('time/')}
    for line in lines
  ]


def is_half(state):
  """Whether a save has begun, and not ended."""
  names = [file.name for file in files.all_files(state)]
  return bool(names) and not (state / 'commit_success.txt').exists()


def test_a_run_that_is_killed_in_a_save_goes_on_elsewhere(
  folder, run, undisturbed, environment, store
):
  workdir = folder / 'killed'
  main, *arguments = train(folder, 'killed')
  for number in (18,):
    process = subprocess.Popen(
      [sys.executable, ROOT / 'launch' / main, *arguments],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    while not is_half(workdir / 'checkpoints' / str(number)):
      assert process.poll() is None
      time.sleep(0.005)
    process.kill()
    process.wait()
    store.forget_this_machine()
  run(main, *arguments)
  assert outcome(workdir) == outcome(undisturbed)
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == [
    '18',
    '24',
  ]
  summaries = [
    files.read_json(folder / 'summary.json')
    for folder in (workdir, undisturbed)
  ]
  assert summaries[0]['heldout_nats'] == summaries[1]['heldout_nats']
  assert summaries[0]['goodput']['starts'] == 2
  assert [*(workdir / 'tensorboard').iterdir()]
  assert run(main, *arguments)  # finished: its summary, at once


@pytest.mark.slow
def test_text_is_prepared_there(folder, run):
  prepare = (
    'prepare_data.py',
    f'--path={folder}/texts',
    f'--out={folder}/tokens',
    '--tokenizer=train:300',
  )
  run(*prepare)
  assert (folder / 'tokens/index.json').exists()
  assert not (folder / 'tokens/parts').exists()
  run(*prepare)  # which finds that it is done
  index = files.read_json(folder / 'tokens/index.json')
  assert index['num_documents'] == 159
  run(*train(folder, 'on_tokens', 'tokens'))
  assert len(outcome(folder / 'on_tokens')) == 24


@pytest.mark.slow
def test_machines_share_the_preparation_there(folder, run):
  """Two, and one that is started again: the tokens of one machine alone."""
  alone, shared = folder / 'by_one', folder / 'by_two'

  def prepare(out, *arguments):
    command = (f'--path={folder}/texts', f'--out={out}', '--tokenizer=bytes')
    run('prepare_data.py', *command, *arguments)

  prepare(alone)
  for stage, machine in (
    ('tokens', 1),
    ('tokens', 0),
    ('tokens', 0),
    ('merge', 0),
    ('merge', 1),
  ):
    assert not (shared / 'index.json').exists()
    prepare(shared, f'--stage={stage}', f'--shard={machine}/2')
  want, got = (files.read_json(out / 'index.json') for out in (alone, shared))
  assert got['sha256'] == want['sha256']
  assert got['num_documents'] == want['num_documents'] == 159


@pytest.mark.slow
def test_a_run_is_read_where_it_is(folder, run, undisturbed):
  where = f'--workdir={undisturbed}'
  found = json.loads(run('evaluate.py', where, '--sequences=8').split('\n')[0])
  last = outcome(undisturbed)[-1]
  assert found['loss/heldout'] == pytest.approx(last['loss/heldout'], 1e-6)
  assert run('sample.py', where, '--num_tokens=4')
  assert 'nats a token' in run('dissect.py', where, '--rows=2')
  run('export.py', where, f'--out={folder}/exported')
  names = sorted(file.name for file in (folder / 'exported').iterdir())
  assert names == ['config.json', 'model.safetensors']
  _, tree, _ = safetensors.load(folder / 'exported')
  assert tree


@pytest.mark.slow
def test_a_comparison_is_trained_and_reported_there(folder, run):
  compare = (
    'compare.py',
    f'--config={ROOT}/configs/smoke.py',
    f'--workdir={folder}/compared',
    '--panels=streams',
    *(flag.replace('config.', 'config.base.') for flag in BASE),
    '--config.panels.streams.num_steps=24',
    '--config.panels.streams.seeds=(0,)',
    '--config.panels.streams.num_blocks=(1,)',
    '--config.panels.streams.batch_size=4',
  )
  run(*compare)
  report = (folder / 'compared/report.html').read_bytes()
  assert b'</html>' in report
  figures = files.all_files(folder / 'compared/figures')
  assert '.png' in [figure.suffix for figure in figures]
  run('compare.py', f'--workdir={folder}/compared', '--report_only')


@pytest.mark.slow
def test_a_second_start_is_refused(folder, environment, undisturbed):
  from mhc.runtime import leases

  with leases.take(undisturbed / 'lock', 'run', leases.Watcher()):
    main, *arguments = train(folder, 'undisturbed')
    result = subprocess.run(
      [sys.executable, ROOT / 'launch' / main, *arguments],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
  assert result.returncode == 2
  assert 'is in use by host' in result.stderr
  assert f'process {os.getpid()}' in result.stderr
