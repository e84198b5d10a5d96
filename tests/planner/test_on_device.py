"""What is said of a device; the device here is a CPU."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mhc.kernels.xla import ops
from mhc.planner import on_device


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


@pytest.mark.usefixtures('optax_promotion')
def test_steps():
  base = on_device.base(num_blocks=2, num_rows=1)
  data = dataclasses.replace(base.data, seq_len=8)
  base = dataclasses.replace(base, data=data)
  (row,) = on_device.step_rows(base, ['residual'], 1)
  assert row['over_first'] == 1
  tokens = base.data.batch_size * base.data.seq_len
  assert row['tokens_per_second'] == pytest.approx(1e3 * tokens / row['ms'])
  assert on_device.product_rate(1) > row['flops_per_second'] > 0
