"""The notebooks are what their sources make, and run from top to bottom."""

import importlib.util
import os
import pathlib
import signal
import threading
import time

import forked_kernels
import nbclient
import nbformat
import pytest
import quick_compilation

pytestmark = pytest.mark.long

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


build = _load(ROOT / 'notebooks' / 'build.py')
FEW_ITERATIONS = 'connection=config.ConnectionConfig(sinkhorn_iters=3)'
SOURCES = {source.stem: source for source in build.sources()}


@pytest.fixture(scope='module')
def kernels(compiled, tmp_path_factory):
  """Forks kernels; and their environment."""
  environment = os.environ | quick_compilation.environment(compiled)
  folder = tmp_path_factory.mktemp('kernels')
  with forked_kernels.Kernels(environment, folder) as kernels:
    yield kernels, environment


@pytest.fixture
def execute(kernels, tmp_path, monkeypatch):
  """Runs a notebook in a folder of its own; returns it with its outputs.

  Each of `changes` is a text of it and what stands there instead: sizes, for
  the sake of the compiler.
  """
  forked, environment = kernels
  environment = environment | {'TMPDIR': str(tmp_path)}
  monkeypatch.setenv('JUPYTER_PATH', forked.path)

  def run(name, *changes, before_cell=lambda client, cell: None):
    source = (ROOT / 'notebooks' / f'{name}.ipynb').read_text()
    for old, new in changes:
      assert source.count(old) == 1, old
      source = source.replace(old, new)
    book = nbformat.reads(source, 4)
    client = nbclient.NotebookClient(
      book,
      timeout=280,
      kernel_name='forked',
      resources={'metadata': {'path': str(tmp_path)}},
      on_cell_execute=lambda cell, cell_index: before_cell(client, cell),
    )
    client.execute(env=environment)
    assert 'Warning' not in said(book, stream='stderr')
    for cell in book.cells:
      if cell.source.startswith('# @title Install'):
        assert not cell.outputs
    return book

  return run


def said(book, stream='stdout', containing='') -> str:
  """What the cells whose source contains a text have printed."""
  return ''.join(
    output.text
    for cell in book.cells
    if cell.cell_type == 'code' and containing in cell.source
    for output in cell.outputs
    if output.output_type == 'stream' and output.name == stream
  )


def pictures(book) -> int:
  return sum(
    'image/png' in output.get('data', {})
    for cell in book.cells
    for output in cell.get('outputs', ())
  )


def test_every_source_has_a_notebook_and_every_notebook_a_source():
  found = {path.stem for path in (ROOT / 'notebooks').glob('*.ipynb')}
  assert found == {*SOURCES}


@pytest.mark.parametrize('name', SOURCES)
def test_notebooks_are_built_from_their_sources(name):
  """`make notebooks` makes them again."""
  path = build.notebook(SOURCES[name])
  assert path.read_text() == build.build(SOURCES[name])
  assert path.stat().st_size < 100_000
  for cell in nbformat.read(path, 4).cells:
    assert not cell.get('outputs')
    assert cell.get('execution_count') is None


def test_sinkhorn(execute):
  book = execute(
    'sinkhorn',
    ('(1, 2, 3, 5, 8, 12, 20, 32)', '(1, 3, 20)'),
    ('DEPTH, TOKENS = 64, 256', 'DEPTH, TOKENS = 64, 16'),
  )
  assert pictures(book) == 5


def test_own_model(execute):
  book = execute(
    'own_model', ('STREAMS, BLOCKS = 32, 4, 3', 'STREAMS, BLOCKS = 32, 4, 2')
  )
  losses = said(book, containing='step(params, state)')
  assert losses.count('100.0% right') == 3, losses
  assert 'mHC  gain forward 1.000' in said(book)


def test_gains(execute):
  book = execute(
    'gains',
    ('DEPTH, TOKENS, N = 96, 256, 4', 'DEPTH, TOKENS, N = 24, 32, 4'),
    ('num_steps=20', 'num_steps=8'),
    ('num_blocks=8', 'num_blocks=1'),
    ('Config(kind=kind)', 'Config(kind=kind, sinkhorn_iters=3)'),
  )
  assert pictures(book) == 6


def test_kernels_say_that_a_cpu_measures_nothing(execute):
  book = execute('kernels_on_this_tpu', ('128, 37, 4', '128, 5, 4'))
  assert 'Nothing can be measured here' in said(book)
  assert 'advance: largest relative difference' in said(book)


def test_a_comparison_is_interrupted_saves_and_goes_on(execute, text, tmp_path):
  """The stop button sends SIGINT, as here once a run has made steps."""

  def before_cell(client, cell):
    if 'def train' in cell.source:
      pid = client.km.provisioner.pid
      threading.Thread(target=interrupt, args=(pid,), daemon=True).start()

  def interrupt(pid):
    while True:
      for path in tmp_path.glob('**/metrics.jsonl'):
        if path.read_bytes().count(b'\n') >= 2:
          os.kill(pid, signal.SIGINT)
          return
      time.sleep(0.02)

  book = execute(
    'compare',
    ('num_steps=20', 'num_steps=10'),
    ('num_blocks=(2,)', 'num_blocks=(1,)'),
    ('dim=32, ', f'dim=32, {FEW_ITERATIONS}, '),
    ('DataConfig(seq_len=32)', f'DataConfig(seq_len=32, path={text!r})'),
    before_cell=before_cell,
  )
  stopped = said(book, containing='def train')
  assert 'saved after step' in stopped
  finished = [*tmp_path.glob('**/summary.json')]
  assert len(finished) == 8
  assert 'mHC against residual' in said(book)
  assert pictures(book) == 3
