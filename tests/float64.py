"""Formulas are tested twice: as they are, and with float32 read as float64.

    MHC_TEST_FLOAT64=1 python -m pytest tests/library/test_depth.py -k formula

What the library casts to float32 is then computed in float64, and agrees with
models of the papers to 1e-12: what is left is no rounding.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

ON = bool(os.environ.get('MHC_TEST_FLOAT64'))
DTYPE = np.float64 if ON else np.float32


def set_up():
  """To be called before anything of ours is imported."""
  if ON:
    jax.config.update('jax_enable_x64', True)
    jnp.float32 = jnp.float64


def tolerance(single: float, double: float = 1e-12) -> float:
  return double if ON else single
