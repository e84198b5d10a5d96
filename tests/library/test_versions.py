"""The library on the oldest and the newest JAX that it promises to run on."""

import json
import pathlib
import subprocess
import sys

import one_gradient
import pytest
import quick_compilation

HERE = pathlib.Path(__file__).resolve().parent
# Those of conftest.py are not all known to the oldest, which would not start.
XLA_FLAGS = (
  '--xla_force_host_platform_device_count=2 ' + quick_compilation.FLAGS
)


@pytest.fixture(scope='module')
def expected():
  return one_gradient.numbers()


@pytest.mark.parametrize('which', ['oldest', 'newest'])
def test_it_gives_the_same_gradients(which, expected, monkeypatch):
  """As on the versions of constraints.txt, on which the other tests run."""
  pins = (HERE.parent / 'versions' / f'{which}.txt').read_text().splitlines()
  pins = dict(pin.split('==') for pin in pins if not pin.startswith('#'))
  folder = pathlib.Path(sys.prefix) / 'versions' / which
  assert folder.exists(), f'make .venv/versions/{which}/installed'
  monkeypatch.setenv('PYTHONPATH', str(folder))
  monkeypatch.setenv('XLA_FLAGS', XLA_FLAGS)
  result = subprocess.run(
    [sys.executable, HERE / 'one_gradient.py'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert found['versions'] == found['versions'] | pins
  assert found['numbers'] == pytest.approx(expected, rel=1e-5)
