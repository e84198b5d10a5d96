"""Processes that use mhc.runtime without JAX, which takes seconds to import."""

import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# In place of the library's front, which imports JAX.
FRONT = f"""
import sys, types
sys.modules['mhc'] = types.ModuleType('mhc')
sys.modules['mhc'].__path__ = [{str(ROOT / 'mhc')!r}]
"""


def start(code: str, *arguments) -> subprocess.Popen:
  """Starts Python on `code`, with pipes."""
  return subprocess.Popen(
    [sys.executable, '-c', FRONT + code, *map(str, arguments)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(condition, seconds=20):
  """Returns what `condition()` is when it is true at last."""
  deadline = time.monotonic() + seconds
  while not (value := condition()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  return value
