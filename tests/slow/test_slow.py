"""The slow proofs as tests: `pytest -m slow tests/slow`, hours in total.

Each is a script that can also be run by hand; tests/README.md describes them.
"""

import faulthandler
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1]
# Variables that conftest sets for its own process only.
SET = ('JAX_PLATFORMS', 'TRITON_INTERPRET', 'XLA_FLAGS')


@pytest.fixture
def no_time_limit():
  """Cancels pyproject.toml's faulthandler_timeout of five minutes."""
  faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.usefixtures('no_time_limit')
@pytest.mark.parametrize(
  'command',
  [
    'slow/pipeline_grid.py',
    'slow/multi_process.py',
    'slow/fuzz_config.py --minutes=60',
    'slow/fuzz_data.py',
    'slow/agreement.py',
    'fault_injection --trials=50',
    'slow/workers.py',
    'slow/prepare.py',
    'slow/colab.py',
    'slow/huggingface.py',
    'slow/harness.py',
  ],
)
def test_proof(command):
  environment = {k: v for k, v in os.environ.items() if k not in SET}
  script, *flags = command.split()
  result = subprocess.run(
    [sys.executable, TESTS / script, *flags], env=environment, check=False
  )
  assert result.returncode == 0
