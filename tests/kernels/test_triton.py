"""Triton's kernels in its interpreter, against the reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc.kernels import api
from mhc.kernels import reference

pytest.importorskip('triton', reason='Triton is for Linux')
from mhc.kernels.triton import sinkhorn


def both_ways(function, arguments, cotangents):
  """The outputs and every gradient."""
  outputs, pull_back = jax.vjp(function, *arguments)
  return [*jax.tree.leaves(outputs), *pull_back(cotangents)]


def exact(function, arguments, cotangents):
  """`both_ways` in float64."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x), jnp.float64),
      (arguments, cotangents),
    )
    return [np.asarray(x) for x in both_ways(function, *wide)]


def compare(name, arguments, *static, seed=0):
  """Outputs and gradients of an operation, from random cotangents."""
  plain = lambda *inputs: getattr(reference, name)(*inputs, *static)
  kernel = lambda *inputs: getattr(api, name)(*inputs, *static, 'triton')
  draw = np.random.default_rng(seed)
  cotangents = jax.tree.map(
    lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype),
    jax.eval_shape(plain, *arguments),
  )
  results = both_ways(kernel, arguments, cotangents)

  def advance(*inputs):
    """The reference, with x' as the kernel rounded it."""
    out = reference.post(*inputs[:4])
    rounding = np.asarray(results[0], np.float64) - out
    out = out + jax.lax.stop_gradient(rounding)
    return out, *reference.pre(out, *inputs[4:], *static)

  oracle = advance if name == 'advance' else plain
  wants = exact(oracle, arguments, cotangents)
  if name == 'advance':
    wants[0] = exact(plain, arguments, cotangents)[0]
  for number, (got, want) in enumerate(zip(results, wants, strict=True)):
    assert got.shape == want.shape
    error = np.max(np.abs(np.asarray(got, np.float64) - want))
    largest = np.max(np.abs(want))
    if got.dtype == jnp.bfloat16:
      bound = 2 * np.spacing(largest.astype(got.dtype)).astype(np.float64)
    else:
      bound = 2e-5 * largest
    assert error <= bound, (name, number, error, bound)


def inputs(n, d, num_tokens, dtype, num=None, seed=0):
  """x, y, post, res, phi, alpha, bias."""
  draw = np.random.default_rng(seed)
  num = num or 2 * n + n * n
  shapes = {
    'x': (num_tokens, n, d),
    'y': (num_tokens, d),
    'post': (n, num_tokens),
    'res': (n, n, num_tokens),
    'phi': (n * d, num),
    'alpha': (),
    'bias': (n,),
  }
  return [
    jnp.asarray(
      draw.normal(size=shape) * ((n * d) ** -0.5 if name == 'phi' else 1),
      dtype if name in 'xy' else jnp.float32,
    )
    for name, shape in shapes.items()
  ]


CASES = [
  (2, 128, 17, jnp.float32),
  (3, 128, 5, jnp.bfloat16),
  (4, 128, 37, jnp.bfloat16),
  (4, 256, 5, jnp.float32),
  (8, 128, 5, jnp.bfloat16),
]


@pytest.mark.parametrize('operation', ['pre', 'post', 'advance', 'collapse'])
@pytest.mark.parametrize(('n', 'd', 'tokens', 'dtype'), CASES)
def test_streams_in_float64(operation, n, d, tokens, dtype):
  x, y, post, res, phi, alpha, bias = inputs(n, d, tokens, dtype)
  operands, static = {
    'pre': ((x, phi, alpha, bias), (1e-6,)),
    'post': ((x, y, post, res), ()),
    'advance': ((x, y, post, res, phi, alpha, bias), (1e-6,)),
    'collapse': ((x, y, post, res), ()),
  }[operation]
  compare(operation, operands, *static)


@pytest.mark.parametrize('num', [2, 33])
def test_any_number_of_projections(num):
  """phi of few and of odd numbers of columns, alpha = 0, one token."""
  x, _, _, _, phi, alpha, bias = inputs(2, 128, 1, jnp.float32, num)
  compare('pre', (x, phi, 0 * alpha, bias), 1e-20)


@pytest.mark.parametrize(
  ('n', 'num_iters', 'eps'),
  [(2, 1, 0.0), (3, 2, 1e-6), (4, 6, 1e-6), (4, 20, 0.0), (8, 6, 0.0)],
)
def test_sinkhorn(n, num_iters, eps):
  """Ragged tokens, logits up to a standard deviation of 8."""
  draw = np.random.default_rng(n)
  spread = np.linspace(0.1, 8, sinkhorn.TOKENS + 37)
  logits = jnp.asarray(spread * draw.normal(size=(n, n, len(spread))), 'f4')
  cotangent = jnp.asarray(draw.normal(size=logits.shape), 'f4')
  results = both_ways(
    lambda x: sinkhorn.sinkhorn(x, num_iters, eps), (logits,), cotangent
  )
  plain = lambda x: reference.sinkhorn(x, num_iters, eps)
  for got, want in zip(
    results, exact(plain, (logits,), cotangent), strict=True
  ):
    bound = 2e-5 * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize('eps', [0.0, 1e-6])
def test_extreme_logits(eps):
  """Spreads that overflow exp leave finite matrices whose rows sum to one."""
  draw = np.random.default_rng(0)
  logits = jnp.asarray(1e3 * draw.normal(size=(4, 4, 37)), 'f4')
  matrix, gradient = both_ways(
    lambda x: sinkhorn.sinkhorn(x, 20, eps), (logits,), logits / 1e3
  )
  np.testing.assert_allclose(np.sum(matrix, axis=1), 1, rtol=2e-5)
  assert np.all(np.isfinite(gradient))
