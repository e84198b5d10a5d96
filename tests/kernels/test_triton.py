"""Triton's kernels in its interpreter, against the reference in float64."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc.kernels import api
from mhc.kernels import parity

pytest.importorskip('triton', reason='Triton is for Linux')
from mhc.kernels.triton import sinkhorn


def check(operation, arguments, *static):
  """Errors of outputs and gradients are within rounding."""
  for error in parity.errors(operation, arguments, static, 'triton'):
    assert error.largest <= error.bound, (operation, error)


TINY = [case for case in parity.CASES if case[2] < 100]
OFTEN = (3, 128, 5, jnp.bfloat16), (4, 256, 5, jnp.float32)


@pytest.mark.parametrize('operation', ['pre', 'post', 'advance', 'collapse'])
@pytest.mark.parametrize(
  ('n', 'd', 'tokens', 'dtype'),
  [
    *OFTEN,
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in TINY
      if case not in OFTEN
    ),
  ],
)
def test_streams_in_float64(operation, n, d, tokens, dtype):
  static = {'pre': (1e-6,), 'advance': (1e-6,)}.get(operation, ())
  check(operation, parity.operands(operation, n, d, tokens, dtype), *static)


@pytest.mark.parametrize('num', [2, 33])
def test_any_number_of_projections(num):
  """phi of few and of odd numbers of columns, alpha = 0, one token."""
  x, phi, alpha, bias = parity.operands('pre', 2, 128, 1, jnp.float32, num)
  check('pre', (x, phi, 0 * alpha, bias), 1e-20)


@pytest.mark.parametrize(
  ('n', 'num_iters', 'eps'),
  [(2, 1, 0.0), (3, 2, 1e-6), (4, 6, 1e-6), (4, 20, 0.0)],
)
def test_sinkhorn(n, num_iters, eps):
  """Ragged tokens, logits up to a standard deviation of 8."""
  draw = np.random.default_rng(n)
  spread = np.linspace(0.1, 8, sinkhorn.TOKENS + 37)
  logits = jnp.asarray(spread * draw.normal(size=(n, n, len(spread))), 'f4')
  check('sinkhorn', (logits,), num_iters, eps)


def test_the_kernels_are_the_first_choice_on_gpus(monkeypatch):
  """Where jax-triton can be imported; plain JAX, and a line, where not."""
  said = []
  monkeypatch.setattr(api.logging, 'warning', said.append)
  for module, names in (
    (types.ModuleType('jax_triton'), ('triton', 'xla')),
    (None, ('xla',)),  # import raises
  ):
    api._why_no_triton.cache_clear()
    api._warn_once.cache_clear()
    monkeypatch.setitem(sys.modules, 'jax_triton', module)
    assert api.preferred('gpu') == names
  api._why_no_triton.cache_clear()
  (line,) = said
  assert "not used: pip install 'mhc-jax[triton]'" in line
  assert api.preferred('cpu') == ('xla',)


def test_more_streams_than_fit_in_registers():
  with pytest.raises(NotImplementedError, match='at most 4 streams, not 8'):
    api.sinkhorn(jnp.zeros((8, 8, 3)), implementation='triton')


@pytest.mark.parametrize('eps', [0.0, 1e-6])
def test_extreme_logits(eps):
  """Spreads that overflow exp leave finite matrices whose rows sum to one."""
  draw = np.random.default_rng(0)
  logits = jnp.asarray(1e3 * draw.normal(size=(4, 4, 37)), 'f4')
  matrix, pull_back = jax.vjp(lambda x: sinkhorn.sinkhorn(x, 20, eps), logits)
  (gradient,) = pull_back(logits / 1e3)
  np.testing.assert_allclose(np.sum(matrix, axis=1), 1, rtol=2e-5)
  assert np.all(np.isfinite(gradient))
