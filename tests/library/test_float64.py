"""The formulas with nothing left to rounding: see `float64`."""

import os
import pathlib
import subprocess
import sys

CASES = (
  'attn_res-4 or mhar-2 or dense_former or x0 or tbp-4-0-0.3 or go-4-2-0.3'
)
CASES += (
  ' or cyclic or frac or wide or gradients and (4 or single) and not identity'
)
CASES += ' or linear'


def test_they_hold_to_twelve_digits():
  folder = pathlib.Path(__file__).parent
  names = 'depth', 'mixing', 'frac', 'wide', 'connections'
  command = [sys.executable, '-m', 'pytest', '-k', f'formula and ({CASES})']
  command += [folder / f'test_{name}.py' for name in names]
  command.append(folder.parent / 'model' / 'test_value_residual.py')
  ran = subprocess.run(
    command,
    env=os.environ | {'MHC_TEST_FLOAT64': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ran.returncode == 0, ran.stdout
  assert ran.stdout.count('.') >= 18, ran.stdout
