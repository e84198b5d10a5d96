"""mHC's share of a step, from kernels whose schedule is given."""

import pathlib

import pytest

from mhc.config import presets
from mhc.kernels import chips
from mhc.parallel import counts
from mhc.planner import connection_cost
from mhc.planner import cost
from mhc.planner import kernel_cost


def test_a_sublayer_calls_three_kernels(monkeypatch):
  """By their bytes where those take longer, else by their bundles."""
  counted = {'forward': 1, 'backward': 10**9}
  monkeypatch.setattr(kernel_cost, 'scheduled', lambda *_: counted)
  (row,) = connection_cost.rows(['3b'], ['v5p'], pathlib.Path())
  what = dim, generation = 1280, 'v5p'
  forward = kernel_cost.hbm_ns_per_token('advance', 'forward', *what)
  backward = kernel_cost.schedule_ns_per_token(
    'advance', 'backward', dim, generation, 10**9
  )
  spent = 2 * forward / cost.STREAMED + backward
  assert row['ns_per_sublayer_and_token'] == pytest.approx(spent)
  residual = presets.paper('3b', 'residual').model
  flops = counts.count(residual, 4096)['flops_per_token']
  at_a_half = flops / chips.CHIPS['v5p'].flops / 0.5  # seconds a token
  assert row['share_at_50%'] == pytest.approx(24 * spent * 1e-9 / at_a_half)
