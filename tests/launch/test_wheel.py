"""The wheel: what users have who install it, and have no clone."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import quick_compilation

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ('configs', 'kernels', 'launch', 'mhc')
FILES = ('LICENSE', 'README.md', 'pyproject.toml', 'setup.py')
PIP = (sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q')
OFFLINE = ('--no-deps', '--no-index')
SMALL = (
  '--config.num_steps=2',
  '--config.optimizer.warmup_steps=1',
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.model.connection.sinkhorn_iters=3',
  '--config.data.seq_len=16',
  '--config.data.batch_size=2',
  '--config.eval_sequences=2',
)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder in which the wheel is installed."""
  source, wheels, site = map(
    tmp_path_factory.mktemp, ('source', 'wheels', 'site')
  )
  # Of a copy: a build leaves files behind.
  ignored = shutil.ignore_patterns('__pycache__')
  for name in FOLDERS:
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  for name in FILES:
    shutil.copy(ROOT / name, source)
  build = ('wheel', '--no-build-isolation', *OFFLINE, '-w', wheels, source)
  subprocess.run([*PIP, *build], check=True)
  (wheel,) = wheels.iterdir()
  install = ('install', '--no-compile', *OFFLINE, '--target', site, wheel)
  subprocess.run([*PIP, *install], check=True)
  return site


@pytest.fixture
def run(site, compiled, tmp_path):
  """Runs a command with the wheel before the clone, in an empty folder."""

  def run(*command, cwd=None, path=site):
    if cwd is None:
      cwd = tmp_path / 'empty'
      cwd.mkdir(exist_ok=True)
    environment = quick_compilation.environment(compiled)
    environment |= {'PYTHONPATH': str(path)}
    result = subprocess.run(
      [sys.executable, *command],
      capture_output=True,
      text=True,
      cwd=cwd,
      env=os.environ | environment,
      check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout

  return run


def test_it_holds_all_that_runs(site):
  for name in FOLDERS:
    installed = site / 'mhc' / name.removeprefix('mhc')
    for path in (ROOT / name).rglob('*'):
      if path.is_file() and '__pycache__' not in path.parts:
        assert (installed / path.relative_to(ROOT / name)).exists(), path
  assert {path.name for path in site.glob('[!m]*')} == {'bin'}


def test_every_main_is_a_command(site):
  mains = {path.stem for path in ROOT.glob('launch/[!_]*.py')}
  commands = {path.name for path in site.glob('bin/*')}
  assert commands == {f'mhc-{main.replace("_", "-")}' for main in mains}


def test_the_library_does_not_load_the_mains(site, run):
  code = 'import mhc, sys; print(mhc.__file__, mhc.__version__, *sys.modules)'
  file, version, *modules = run('-c', code).split()
  assert file == str(site / 'mhc' / '__init__.py')
  assert version == '0.1.0'
  assert not {'mhc.launch', 'mhc.configs', 'mhc.runtime'} & {*modules}


def test_python_that_starts_in_a_clone_finds_all_of_it(run, tmp_path):
  """Its current folder comes before what is installed."""
  clone = tmp_path / 'clone'
  for name in FOLDERS:
    (clone / name).parent.mkdir(exist_ok=True)
    (clone / name).symlink_to(ROOT / name)
  code = """
import sys
# Without the editable installation of the environment of these tests.
sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]
import mhc, mhc.kernels.api, mhc.configs.tiny, mhc.launch
print(mhc.kernels.api.__file__)
"""
  out = run('-c', code, cwd=clone, path='')
  assert out.strip() == str(clone / 'kernels' / 'api.py')


def test_a_command_finds_a_config_by_its_name(site, run):
  count = ('--config=paper_3b:residual', '--count')
  assert '"connection_params": 0' in run(site / 'bin' / 'mhc-aot', *count)


def test_it_trains(run, text, tmp_path):
  main = ('-m', 'mhc.launch.train', '--config=configs/tiny.py')
  out = run(
    *main, f'--workdir={tmp_path}/run', f'--config.data.path={text}', *SMALL
  )
  assert 'bits per byte' in out
