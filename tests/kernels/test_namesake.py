"""`import kernels` in a clone: another package has this name, too."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_other_package_is_found(tmp_path, monkeypatch):
  package = tmp_path / 'kernels'
  package.mkdir()
  (package / '__init__.py').write_text('word = "other"')
  (package / 'layer.py').write_text('from kernels import word')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  result = in_the_clone('from kernels import layer; print(layer.word)')
  assert result.stdout == 'other\n', result.stderr


def test_without_one_the_message_says_what_this_is():
  result = in_the_clone('import kernels')
  assert 'import mhc.kernels' in result.stderr.splitlines()[-1]
  assert str(ROOT / 'kernels') in result.stderr.splitlines()[-1]


def in_the_clone(code):
  return subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
