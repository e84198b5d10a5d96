"""What is said of a device; the device here is a CPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mhc.kernels.xla import ops
from mhc.planner import on_device
from mhc.planner import search


def errors():
  (row,) = on_device.parity_rows(['pre'], [(2, 128, 3, jnp.float32)])
  return row


def test_errors_are_in_units_of_rounding(monkeypatch):
  assert 0 < errors()['xla'] < 1
  right = ops.pre
  for wrong, least in (
    (lambda *a: (right(*a)[0], 1.001 * right(*a)[1]), 10),
    (lambda *a: (np.nan * right(*a)[0], right(*a)[1]), np.inf),
  ):
    monkeypatch.setattr(ops, 'pre', wrong)
    assert errors()['xla'] >= least


def test_a_kernel_that_fails_is_named(monkeypatch):
  def fail(*_):
    raise NotImplementedError('no such unit\nand more')

  monkeypatch.setattr(ops, 'pre', fail)
  row = errors()
  assert row['xla'] is None
  assert row['xla_worst'] == 'NotImplementedError: no such unit'


@pytest.mark.slow
@pytest.mark.usefixtures('optax_promotion')
def test_steps():
  base = on_device.base(num_blocks=2, num_rows=1)
  data = dataclasses.replace(base.data, seq_len=8)
  base = dataclasses.replace(base, data=data)
  (row,) = on_device.step_rows(base, ['residual'], 1)
  assert row['over_first'] == 1
  tokens = base.data.batch_size * base.data.seq_len
  assert row['tokens_per_second'] == pytest.approx(1e3 * tokens / row['ms'])
  assert 0 < row['share_of_product'] < 1
  # What the formula expects is that share of what was measured.
  expected = row['share_of_product'] * search.PRODUCTS
  assert row['formula_ms'] / row['ms'] == pytest.approx(expected)


def test_attention_by_its_kernel_stands_beside_plain_jax():
  plain, best = on_device.attention_rows(1)
  assert (plain['implementation'], best['implementation']) == ('xla', 'auto')
  assert plain['of_product'] > 0
  assert plain['apart'] == best['apart'] == 0  # of a CPU both are plain
