"""The library on the oldest and the newest JAX that it promises to run on."""

import json
import pathlib
import subprocess
import sys

import one_gradient
import pytest

HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.parametrize('which', ['oldest', 'newest'])
def test_it_gives_the_same_gradients(which, monkeypatch):
  """As on the versions of constraints.txt, on which the other tests run."""
  pins = (HERE.parent / 'versions' / f'{which}.txt').read_text().splitlines()
  pins = dict(pin.split('==') for pin in pins if not pin.startswith('#'))
  folder = pathlib.Path(sys.prefix) / 'versions' / which
  assert folder.exists(), f'make .venv/versions/{which}/installed'
  monkeypatch.setenv('PYTHONPATH', str(folder))
  result = subprocess.run(
    [sys.executable, HERE / 'one_gradient.py'],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert found['versions'] == found['versions'] | pins
  assert found['numbers'] == pytest.approx(one_gradient.numbers(), rel=1e-5)
