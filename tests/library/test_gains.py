"""Gains against their definitions in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import gains
from mhc import manifold

PROFILE = jax.jit(gains.profile)
DIFFERENCES_KEPT = jax.jit(gains.differences_kept)


def random_matrices(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), (*shape, 4, 4))


def test_amax_gain_takes_signed_sums():
  matrix = jnp.array([[3.0, -3.0], [1.0, 0.5]])
  forward, backward = gains.amax_gain(matrix)
  assert forward == 1.5  # not |3| + |-3|
  assert backward == 4.0


def test_composites_multiply_in_the_papers_order():
  h = np.asarray(random_matrices(5, 3), np.float64)
  upto, beyond = gains.composites(jnp.asarray(h, jnp.float32))
  np.testing.assert_allclose(upto[2], h[2] @ h[1] @ h[0], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    beyond[2], h[4] @ h[3] @ h[2], rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(upto[-1], beyond[0], rtol=1e-4, atol=1e-4)


def test_doubly_stochastic_matrices_do_not_amplify():
  logits = random_matrices(12, 64)
  h = manifold.sinkhorn_project(logits, method='newton')
  assert gains.spectral_norm(h).max() < 1 + 1e-5
  upto, beyond = gains.composites(h)
  for product in (upto, beyond):
    forward, backward = gains.amax_gain(product)
    np.testing.assert_allclose(forward, 1, atol=1e-4)
    np.testing.assert_allclose(backward, 1, atol=1e-4)
  unconstrained, _ = gains.composites(logits)
  assert gains.amax_gain(unconstrained)[0][-1].mean() > 100


def test_the_largest_singular_value():
  matrices = np.asarray(random_matrices(300), np.float64)
  matrices[1] = np.diag([1.0, 1.0 - 1e-5, 0.5, 0.0])  # nearly equal ones
  matrices[2] = np.linalg.qr(matrices[2])[0]
  matrices[3] *= 1e25
  matrices[4] *= 1e-25
  matrices[5] = 0
  want = np.linalg.svd(matrices, compute_uv=False)[:, 0]
  found = gains.spectral_norm(jnp.asarray(matrices, jnp.float32))
  np.testing.assert_allclose(found, want, rtol=2e-6)
  assert gains.spectral_norm(jnp.zeros((7, 0, 0))).shape == (7,)


@pytest.mark.parametrize('n', [3, 4])
def test_differences_fall_by_what_is_mixed(n):
  for mixed in (0.01, 0.3):
    layer = (1 - mixed) * np.eye(n) + mixed / n
    h = jnp.broadcast_to(jnp.asarray(layer, jnp.float32), (45, 2, n, n))
    alone, forward, backward = DIFFERENCES_KEPT(h)
    want = (1 - mixed) ** np.arange(1, 46)
    assert want[-1] > gains.FLOOR
    np.testing.assert_allclose(alone, 1 - mixed, rtol=1e-6)
    np.testing.assert_allclose(forward[:, 0], want, rtol=1e-5)
    np.testing.assert_allclose(backward[::-1, 1], want, rtol=1e-5)
    half_life = np.log(0.5) / np.log(1 - mixed)
    np.testing.assert_allclose(gains.half_life(want), half_life, rtol=1e-9)


def test_the_differences_of_any_matrices():
  h = np.asarray(random_matrices(5, 30), np.float64)
  basis = np.linalg.qr(np.eye(4) - np.ones((4, 4)) / 4)[0][:, :3]
  products = np.broadcast_to(np.eye(4), h.shape).copy(), h.copy()
  upto, beyond = products
  for layer in range(5):
    upto[layer] = h[layer] @ (upto[layer - 1] if layer else np.eye(4))
  for layer in reversed(range(4)):
    beyond[layer] = beyond[layer + 1] @ h[layer]
  found = DIFFERENCES_KEPT(jnp.asarray(h, jnp.float32))
  for got, matrices in zip(found, (h, upto, beyond), strict=True):
    want = np.linalg.svd(basis.T @ matrices @ basis, compute_uv=False)[..., 0]
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_what_mhc_starts_with_keeps_of_differences():
  """(e^6 - 1) / (e^6 + 3) a sub-layer, 0.99016."""
  start = manifold.sinkhorn_project(6 * jnp.eye(4) - 3)
  forward = PROFILE(jnp.broadcast_to(start, (96, 1, 4, 4)))
  want = (np.expm1(6) / (np.exp(6) + 3)) ** np.arange(1, 97)
  np.testing.assert_allclose(forward['sigma_diff_fwd'], want, rtol=1e-5)
  half_life = gains.half_life(forward['sigma_diff_fwd'])
  np.testing.assert_allclose(half_life, 70.0815, rtol=1e-4)


@pytest.mark.parametrize('n', [1, 4])
def test_a_profile_of_no_mixing_and_of_all(n):
  identity = PROFILE(jnp.broadcast_to(jnp.eye(n), (3, 5, n, n)))
  uniform = PROFILE(jnp.full((3, 5, n, n), 1 / n))
  for name in ('sigma_diff', 'sigma_diff_fwd', 'sigma_diff_bwd'):
    np.testing.assert_array_equal(identity[name], np.full(3, float(n > 1)))
    np.testing.assert_allclose(uniform[name], 0, atol=gains.FLOOR)
  np.testing.assert_array_equal(identity['effective_rank'], np.full(3, n))
  np.testing.assert_allclose(uniform['effective_rank'], 1, rtol=1e-6)
  np.testing.assert_array_equal(identity['entropy'], 0)
  np.testing.assert_allclose(uniform['entropy'], float(n > 1), rtol=1e-6)
  want = math.inf if n > 1 else math.nan
  np.testing.assert_equal(gains.half_life(identity['sigma_diff_fwd']), want)


def test_products_that_overflow_are_not_finite_at_their_place_alone():
  h = 1e10 * random_matrices(6, 3)
  h = h.at[:, 1:].set(jnp.eye(4))
  _, forward, backward = jax.device_get(DIFFERENCES_KEPT(h))
  profile = jax.device_get(PROFILE(h))
  np.testing.assert_array_equal(forward[:, 1:], 1)
  for values in (forward[:, 0], backward[::-1, 0]):
    assert np.isfinite(values[:3]).all()
    assert (values[:3] > 1e9 ** np.arange(1, 4)).all()
    assert not np.isfinite(values[3:]).any()
  for name in ('sigma_diff_fwd', 'effective_rank', 'entropy'):
    assert np.isfinite(profile[name][:3]).all()
    assert not np.isfinite(profile[name][3:]).any()
  assert np.isfinite(profile['sigma_diff']).all()


def test_half_life_leaves_out_what_has_no_digits():
  sigma = [0.5, 0.25, math.inf, 0.0625, 1e-7, 3e-8, math.nan]
  np.testing.assert_allclose(gains.half_life(sigma), 1.0)
  assert gains.half_life([1.0, 1.5, 2.0]) == math.inf
  assert math.isnan(gains.half_life([0.5, 1e-9]))


def test_rank_and_entropy_against_numpy():
  matrices = np.asarray(random_matrices(50), np.float64)
  values = np.linalg.svd(matrices, compute_uv=False)
  given = jnp.asarray(matrices, jnp.float32)
  want = (values**2).sum(-1) ** 2 / (values**4).sum(-1)
  np.testing.assert_allclose(gains.effective_rank(given), want, rtol=1e-5)
  weights = np.abs(matrices) / np.abs(matrices).sum(-1, keepdims=True)
  want = -(weights * np.log(weights)).sum(-1).mean(-1) / np.log(4)
  np.testing.assert_allclose(gains.entropy(given), want, rtol=1e-5)


@pytest.mark.parametrize(
  'options', [{}, {'num_iters': 1}, {'method': 'newton'}]
)
@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_products_of_sinkhorn_matrices_contract_by_what_their_logits_say(
  n, options
):
  """The theorem, for 6 layers of 200 tokens, and where it is attained."""
  layers, shape = [], (200, n, n)
  bound = np.ones(200)
  for layer in range(6):
    logits = jax.random.normal(jax.random.key(layer), shape)
    layers.append(np.float64(manifold.sinkhorn_project(logits, **options)))
    kappa = np.float64(gains.contraction(logits))
    rows = layers[-1][:, :, None] - layers[-1][:, None]
    kept = np.abs(rows).sum(-1).max((1, 2)) / 2  # Dobrushin's coefficient
    assert (kept <= kappa + 1e-6).all()
    assert np.median(kept / kappa) > 0.5
    bound *= kappa
  product = functools.reduce(lambda a, b: b @ a, layers)
  rows = product[:, :, None] - product[:, None]
  assert (np.abs(rows).sum(-1).max((1, 2)) / 2 <= bound + 1e-6).all()
  if n == 2 and 'num_iters' not in options:
    np.testing.assert_allclose(kept, kappa, atol=1e-5)


def test_number_of_streams_read():
  pre = jnp.array([[0.0, 2.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])
  np.testing.assert_allclose(gains.streams_read(pre), [1, 3, 2], rtol=1e-6)


def test_profile_is_the_mean_over_tokens():
  h = random_matrices(6, 10)
  profile = jax.device_get(PROFILE(h))
  product, per_token = np.broadcast_to(np.eye(4), (10, 4, 4)), []
  for layer in np.asarray(h, np.float64):
    product = layer @ product
    per_token.append(np.abs(product.sum(-1)).max(-1))
  np.testing.assert_allclose(
    profile['composite_fwd'], np.mean(per_token, axis=1), rtol=1e-4
  )
  np.testing.assert_allclose(
    profile['mean_products'][2], product.mean(0), rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(profile['mean'], h.mean(1), rtol=1e-5, atol=1e-6)
  columns = np.abs(np.asarray(h, np.float64).sum(2) - 1)
  np.testing.assert_allclose(
    profile['column_residual_mean'], columns.mean((1, 2)), rtol=1e-5
  )
  np.testing.assert_allclose(
    profile['column_residual_p99'],
    np.percentile(columns.max(2), 99, axis=1),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    profile['sigma_diff_fwd'],
    np.mean(DIFFERENCES_KEPT(h)[1], axis=1),
    rtol=1e-6,
  )
