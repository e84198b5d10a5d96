"""The mains: `python launch/train.py` in a clone, `mhc-train` where installed.

`python -m mhc.launch.train` is the same with a chosen Python.
"""

import importlib.util
import pathlib
import runpy
import sys


def main():
  """Runs the main that the command is named after: mhc-train is train.py."""
  if importlib.util.find_spec('ml_collections') is None:
    sys.exit(
      'error: only the library is installed: the mains need '
      "pip install 'mhc-jax[train]'"
    )
  command = pathlib.Path(sys.argv[0]).stem
  name = command.removeprefix('mhc-').replace('-', '_')
  runpy.run_module(f'mhc.launch.{name}', run_name='__main__', alter_sys=True)
