"""The converged projection and its gradient, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mhc
from mhc import manifold

TOKENS = 2000


def logits_of(n, std, tokens=TOKENS):
  generator = np.random.default_rng(n)
  return (std * generator.normal(size=(tokens, n, n))).astype(np.float32)


def sinkhorn64(logits, num_iters):
  """The iteration in float64, of factors of rows and of columns."""
  z = np.float64(logits)
  m = np.exp(z - z.max((1, 2), keepdims=True))
  u = np.ones(z.shape[:2])
  for _ in range(num_iters):
    v = 1 / np.einsum('tij,ti->tj', m, u)
    u = 1 / np.einsum('tij,tj->ti', m, v)
  return u[:, :, None] * m * v[:, None]


def gradient64(p, g):
  """From the 2n x 2n system of the implicit function theorem."""
  n = p.shape[1]
  eye = np.broadcast_to(np.eye(n), p.shape)
  system = np.block([[eye, p], [p.swapaxes(1, 2), eye]])
  weighted = p * g
  right = np.concatenate([weighted.sum(2), weighted.sum(1)], axis=1)
  inverse = np.linalg.pinv(system, rcond=1e-12)
  both = np.einsum('tab,tb->ta', inverse, right)
  return weighted - p * (both[:, :n, None] + both[:, None, n:])


project = jax.jit(
  lambda x, steps: mhc.sinkhorn_project(x, steps, method='newton'),
  static_argnums=1,
)


iterated = jax.jit(mhc.sinkhorn_project, static_argnums=1)


@jax.jit
def pulled_back(logits, g):
  """The projection by twenty steps, and the gradient."""
  p, pull_back = jax.vjp(lambda x: project(x, 20), logits)
  return p, pull_back(g)[0]


@pytest.mark.parametrize(
  ('n', 'std'),
  [*((n, 1.5) for n in (1, 2, 3, 4, 8)), (2, 30), (4, 5), (4, 30)],
)
def test_eight_steps_are_ten_thousand_iterations(n, std):
  """Wherever as many have arrived: of matrices at 30, a sixth."""
  logits = logits_of(n, std, 60)
  want = sinkhorn64(logits, 10_000 if n < 8 else 1000)
  arrived = np.abs(want.sum(1) - 1).max(1) < 1e-9
  assert arrived.mean() >= {1.5: 1, 5: 0.9, 30: 0.1}[std]
  got = np.asarray(project(logits, 8))
  np.testing.assert_allclose(got[arrived], want[arrived], atol=1e-6)


@pytest.mark.parametrize(
  ('n', 'tokens', 'std'),
  [
    *((4, TOKENS, std) for std in (1, 3, 5, 10, 20, 30)),
    *((8, TOKENS, std) for std in (10, 20, 30)),
    (16, 500, 10),
  ],
)
def test_rows_and_columns_sum_to_one_after_eight_steps(n, tokens, std):
  logits = logits_of(n, std, tokens)
  got = np.asarray(project(logits, 8))
  assert (got >= 0).all()
  np.testing.assert_allclose(got.sum(2), 1, atol=1e-6)
  np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
  if std > 1:
    truncated = np.asarray(iterated(logits, 20))
    error = np.abs(truncated.sum(1) - 1).max(1)
    assert (error > 1e-6).mean() > 0.3  # what the iteration leaves


@pytest.mark.parametrize('std', [1, 3, 10])
@pytest.mark.parametrize('n', [2, 4, 8])
def test_the_gradient_is_that_of_the_limit(n, std):
  logits = logits_of(n, std, 200)
  g = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
  p, got = map(np.asarray, pulled_back(logits, g))
  # Near a permutation the dense system has nothing left to solve.
  second = np.linalg.svd(np.float64(p), compute_uv=False)[:, 1]
  clear = second < 1 - 1e-4
  assert clear.mean() > 0.3
  slow = clear & (second > 0.99)  # the iteration, which takes second^2 a step
  for some, steps in ((clear & ~slow, 1000), (slow, 50_000)):
    limit = sinkhorn64(np.log(np.float64(p[some])), steps)
    want = gradient64(limit, np.float64(g[some]))
    np.testing.assert_allclose(got[some], want, atol=1e-6)
  np.testing.assert_allclose(got.sum(1), 0, atol=5e-5)
  np.testing.assert_allclose(got.sum(2), 0, atol=2e-6)


HARD = {
  'ties': np.zeros((4, 4)),
  'tied rows': np.tile([50.0, -50.0, 50.0, 0.0], (4, 1)),
  'permutation': 50 * np.eye(4)[[2, 0, 3, 1]],
  'far permutation': 1000 * np.eye(4)[[1, 0, 3, 2]],
  'signs': 50 * np.sign(np.sin(np.arange(16)).reshape(4, 4)),
  'triangle': np.where(np.tri(4, dtype=bool), 0.0, -50.0),
  'zeros in a triangle': np.where(np.tri(4, dtype=bool), 0.0, -np.inf),
  'two blocks': np.kron(np.eye(2), np.ones((2, 2))) * 200 - 100,
}


@pytest.mark.parametrize('name', HARD)
def test_hard_logits_have_finite_results_and_gradients(name):
  logits = np.asarray(HARD[name], np.float32)
  p, grad = pulled_back(logits, np.arange(16, dtype=np.float32).reshape(4, 4))
  assert np.isfinite(p).all()
  assert np.isfinite(grad).all()
  np.testing.assert_allclose(np.sum(p, 1), 1, atol=1e-6)
  atol = 0.1 if 'triangle' in name else 1e-6
  np.testing.assert_allclose(np.sum(p, 0), 1, atol=atol)


def test_the_triangle_nears_its_limit():
  """exp(L) has its zeros above the diagonal: only I is doubly stochastic."""
  few, many = (
    np.asarray(project(jnp.asarray(HARD['zeros in a triangle']), steps))
    for steps in (8, 100)
  )
  assert abs(many - np.eye(4)).max() < 0.1 * abs(few - np.eye(4)).max()


def test_without_a_projection_the_residuals_say_so():
  logits = np.full((4, 4), -np.inf)
  logits[:, 0] = logits[0] = 0.0  # no permutation in a hook
  p = project(jnp.asarray(logits), 20)
  assert np.isfinite(p).all()
  rows, columns = manifold.residuals(p)
  assert rows < 1e-6 < 0.1 < columns


def test_the_limit_has_no_iterations_options():
  with pytest.raises(ValueError, match="backward='unrolled'"):
    mhc.sinkhorn_project(jnp.eye(3), method='newton', backward='unrolled')
  with pytest.raises(ValueError, match='eps=1e-06'):
    mhc.sinkhorn_project(jnp.eye(3), 20, 1e-6, method='newton')
  with pytest.raises(NotImplementedError, match="'pallas' has no"):
    mhc.sinkhorn_project(jnp.eye(3), method='newton', implementation='pallas')
  with pytest.raises(ValueError, match="'sinkhorn' or 'newton', got 'halley'"):
    mhc.sinkhorn_project.__wrapped__(jnp.eye(3), method='halley')
