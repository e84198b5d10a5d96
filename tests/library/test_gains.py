"""Gains against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from mhc import gains
from mhc import manifold


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
  h = manifold.sinkhorn_project(logits, 200, 0.0)
  assert gains.spectral_norm(h).max() < 1 + 1e-5
  upto, beyond = gains.composites(h)
  for product in (upto, beyond):
    forward, backward = gains.amax_gain(product)
    np.testing.assert_allclose(forward, 1, atol=1e-4)
    np.testing.assert_allclose(backward, 1, atol=1e-4)
  unconstrained, _ = gains.composites(logits)
  assert gains.amax_gain(unconstrained)[0][-1].mean() > 100


def test_second_eigenvalue():
  identity, uniform = jnp.eye(4), jnp.full((4, 4), 0.25)
  assert gains.second_eigenvalue(identity) == 1
  assert gains.second_eigenvalue(uniform) < 1e-6
  half = 0.5 * identity + 0.5 * uniform
  np.testing.assert_allclose(gains.second_eigenvalue(half), 0.5, atol=1e-6)
  assert gains.second_eigenvalue(jnp.ones((7, 1, 1))).shape == (7,)


def test_profile_is_the_mean_over_tokens():
  h = random_matrices(6, 10)
  profile = jax.device_get(gains.profile(h))
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
