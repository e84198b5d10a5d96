"""The README's Python examples run as they stand."""

import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).resolve().parents[2] / 'README.md'
EXAMPLES = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)

CHECKS = ('assert out.shape == (2, 16, 64)', 'assert h.shape == (8, 4, 4)')


@pytest.mark.parametrize('number', range(len(EXAMPLES)))
def test_example_runs(number):
  result = subprocess.run(
    [sys.executable, '-c', EXAMPLES[number] + CHECKS[number]],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr


def test_there_are_two_examples():
  assert len(EXAMPLES) == 2
  assert len(EXAMPLES[0].strip().splitlines()) <= 26
