"""What is measured of an operation, not how long it takes."""

import pytest

from mhc.planner import kernel_timing


def test_rows_count_bytes_of_both_directions():
  n, width, tokens = 2, 128, 8
  forward, both = kernel_timing.rows(
    ['advance'], [width], tokens, n, 'xla', rounds=1
  )
  assert forward['ideal_bytes'] == (2 * n + 2) * width * 2
  assert both['direction'] == 'forward+backward'
  assert both['ideal_bytes'] == (5 * n + 5) * width * 2
  nanoseconds = forward['ns_per_token'] * tokens
  assert nanoseconds == pytest.approx(forward['ms'] * 1e6)
  (sinkhorn, _) = kernel_timing.rows(['sinkhorn'], [width], tokens, n, rounds=1)
  assert sinkhorn['ideal_bytes'] == 2 * n * n * 4
