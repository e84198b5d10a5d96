"""The schedule of the attention kernels, by the command that prints it."""

import json

import pytest

from mhc.planner import attention_cost


@pytest.mark.slow
def test_the_schedule_on_v5p(launch):
  done = launch('bench.py', 'attention', '--json', '--generations=v5p')
  assert done.returncode == 0, done.stderr
  forward, backward = map(json.loads, done.stdout.splitlines())
  assert forward['kernel'] == 'attention_forward'
  assert backward['kernel'] == 'attention_backward'
  for row, milliseconds in ((forward, 0.8), (backward, 1.6)):
    assert row['products_ms'] < row['schedule_ms'] < milliseconds
    tiles = 4 * 5 / 2 * 32
    seconds = row['bundles_per_tile'] * tiles / 2 / 1.75e9
    assert abs(1e3 * seconds - row['schedule_ms']) < 1e-9
    columns = attention_cost.HEADER.splitlines()[0].count('|')
    assert attention_cost.line(row).count('|') == columns
