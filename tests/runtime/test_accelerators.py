"""A GPU that JAX cannot use is said, with what to install."""

import os
import pathlib
import subprocess
import sys

import pytest

from mhc.runtime import accelerators

ROOT = pathlib.Path(__file__).resolve().parents[2]
JAX = {'jax': '0.11.2', 'jaxlib': '0.11.2'}


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Makes this one a machine with these devices and packages."""
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.setattr(accelerators, 'GPUS', f'{tmp_path}/nvidia[0-9]*')
  monkeypatch.setattr(accelerators, 'TPUS', (f'{tmp_path}/accel[0-9]*',))
  monkeypatch.setattr(accelerators, 'OTHERS', ())
  monkeypatch.setattr(accelerators, 'DRIVER', tmp_path / 'version')

  def make(*devices, driver=None, **packages):
    for device in devices:
      (tmp_path / device).touch()
    if driver:
      text = f'NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}.54.15'
      (tmp_path / 'version').write_text(text)
    versions = JAX | {name.replace('_', '-'): v for name, v in packages.items()}
    monkeypatch.setattr(accelerators, '_version', versions.get)

  return make


def test_a_plugin_of_another_version(machine):
  machine('nvidia0', driver=550, jax_cuda12_plugin='0.7.2')
  line = accelerators.unused()
  assert 'jax-cuda12-plugin 0.7.2 does not go with jaxlib 0.11.2' in line
  assert "pip install -U 'jax[cuda12]==0.11.2'" in line


@pytest.mark.parametrize(
  ('driver', 'extra'), [(580, 'cuda13'), (535, 'cuda12')]
)
def test_no_plugin(machine, driver, extra):
  machine('nvidia0', driver=driver)
  line = accelerators.unused()
  assert 'not installed' in line
  assert f"'jax[{extra}]==0.11.2'" in line


def test_a_plugin_that_does_not_start(machine):
  machine('nvidia0', driver=550, jax_cuda13_plugin='0.11.2')
  assert accelerators.unused() is None  # JAX has not tried
  assert accelerators.unused('gpu') is None
  line = accelerators.unused('cpu')
  assert 'jax-cuda13-plugin 0.11.2 could not start it (driver 550)' in line
  assert "'jax[cuda12]==0.11.2'" in line


def test_a_tpu_without_its_library(machine):
  machine('accel0')
  assert "'jax[tpu]==0.11.2'" in accelerators.unused()
  machine('accel0', libtpu='0.0.48')
  assert accelerators.unused() is None


def test_nothing_is_said_where_all_is_meant(machine, monkeypatch):
  machine()
  assert not accelerators.found()
  assert accelerators.unused('cpu') is None
  machine('nvidia0', 'nvidia1')
  assert accelerators.found()
  assert accelerators.unused() is not None
  for name, value in ('JAX_PLATFORMS', 'cpu'), ('CUDA_VISIBLE_DEVICES', ''):
    with monkeypatch.context() as patch:
      patch.setenv(name, value)
      assert accelerators.unused('cpu') is None


def test_it_is_said_once(machine, capsys):
  machine('nvidia0')
  for platform in (None, 'cpu', 'cpu'):
    accelerators.tell_if_unused(platform)
  assert capsys.readouterr().err.count('an NVIDIA GPU') == 1


def test_mains_say_it(tmp_path):
  (tmp_path / 'nvidia0').touch()
  code = f"""
import runpy, sys
from mhc.runtime import accelerators
accelerators.GPUS = {str(tmp_path)!r} + '/nvidia[0-9]*'
accelerators.DRIVER = accelerators.DRIVER.parent / 'none'
sys.argv = ['evaluate.py', '--workdir=' + {str(tmp_path)!r}]
runpy.run_path({str(ROOT / 'launch' / 'evaluate.py')!r}, run_name='__main__')
"""
  environment = {**os.environ, 'JAX_PLATFORMS': '', 'CUDA_VISIBLE_DEVICES': '0'}
  result = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  note, error = result.stderr.splitlines()
  assert note.startswith('note: there seems to be an NVIDIA GPU')
  assert error.startswith('error: ')
