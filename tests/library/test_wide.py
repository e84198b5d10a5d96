"""The wide residual against float64, and what it starts as."""

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config as config_lib
from mhc import streams
from mhc.connections import wide
from mhc.parallel import counts

DIM, N, TOKENS = 6, 3, 5


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(float64.DTYPE)


def test_the_formula():
  down, up = numbers(N * DIM, DIM), numbers(DIM, N * DIM, seed=1)
  x, g = numbers(TOKENS, N, DIM, seed=2), numbers(TOKENS, N, DIM, seed=3)

  @jax.jit
  def mine(down, up, x):
    module = wide.WideResidual(DIM, N, 0)
    module.down[...], module.up[...] = down, up
    h, context = module.pre(x)
    return module.post(jnp.sin(h), context)

  got, back = jax.vjp(mine, *map(jnp.asarray, (down, up, x)))
  d, u, flat, cotangent = (np.float64(a) for a in (down, up, x, g))
  flat, cotangent = (a.reshape(TOKENS, -1) for a in (flat, cotangent))
  h = flat @ d
  want = flat + np.sin(h) @ u
  np.testing.assert_allclose(
    got.reshape(TOKENS, -1),
    want,
    rtol=float64.tolerance(1e-5),
    atol=float64.tolerance(1e-6),
  )
  dh = (cotangent @ u.T) * np.cos(h)
  gradients = flat.T @ dh, np.sin(h).T @ cotangent, cotangent + dh @ d.T
  for found, each in zip(back(jnp.asarray(g)), gradients, strict=True):
    each = each.reshape(found.shape)
    within = float64.tolerance(1e-5)
    np.testing.assert_allclose(found, each, rtol=within, atol=within)


def test_starts_as_the_plain_residual_and_does_not_stay_so():
  v0, weights = numbers(TOKENS, DIM), numbers(4, DIM, DIM, seed=4)

  def run(modules, v0):
    x = streams.expand(v0, N)
    for module, w in zip(modules, weights, strict=True):
      h, context = module.pre(x)
      x = module.post(jnp.tanh(h @ w), context)
    return x

  modules = [wide.WideResidual(DIM, N, index) for index in range(4)]
  plain = jnp.asarray(v0)
  for w in weights:
    plain = plain + jnp.tanh(plain @ w)
  found = run(modules, jnp.asarray(v0))
  for stream in range(N):
    np.testing.assert_allclose(found[:, stream], plain, rtol=1e-5, atol=1e-5)
  g = jnp.asarray(numbers(TOKENS, DIM, seed=5))
  loss = lambda m: (run(m, jnp.asarray(v0)).mean(1) * g).sum()
  gradient = jax.grad(loss)(modules)
  moved = jax.tree.map(lambda a, b: a - 0.1 * b, modules, gradient)
  found = run(moved, jnp.asarray(v0))
  assert float(jnp.std(found, axis=1).max()) > 1e-3


def test_parameters_are_counted_to_the_digit():
  model = config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig(kind='wide_residual')
  )
  plain, found = (counts.count(m, 16) for m in (model.plain, model))
  own = 8 * 2 * 4 * 64 * 64
  assert found['total_params'] - plain['total_params'] == own
  assert found['connection_params'] == own
  with pytest.raises(ValueError, match=r'res=.* would not be used'):
    config_lib.ConnectionConfig(kind='wide_residual', res='off')
