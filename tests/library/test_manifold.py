"""sinkhorn_project against a float64 oracle written from the definition."""

import functools

import double_precision
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import manifold


def oracle(logits, cotangent, num_iters, eps):
  """Forward and gradient in float64, by autodiff of the plain iteration."""
  with double_precision.x64():
    logits = jnp.asarray(logits, jnp.float64)
    cotangent = jnp.asarray(cotangent, jnp.float64)
    both = plain_iteration(num_iters, eps)
    return jax.tree.map(np.asarray, both(logits, cotangent))


@functools.cache
def plain_iteration(num_iters, eps):
  """Compiled: (logits, cotangent) -> the result and the gradient."""

  def with_eps(m, _):
    m = m / (m.sum(-2, keepdims=True) + eps)
    return m / (m.sum(-1, keepdims=True) + eps), None

  def in_logarithms(x, _):  # where nothing overflows
    x = x - jax.nn.logsumexp(x, axis=-2, keepdims=True)
    return x - jax.nn.logsumexp(x, axis=-1, keepdims=True), None

  def project(x):
    if not eps:
      return jnp.exp(jax.lax.scan(in_logarithms, x, length=num_iters)[0])
    m = jax.nn.softmax(x, axis=-2) + eps
    m = m / (m.sum(-1, keepdims=True) + eps)
    return jax.lax.scan(with_eps, m, length=num_iters - 1)[0]

  @jax.jit
  def both(logits, cotangent):
    out, vjp = jax.vjp(project, logits)
    return out, vjp(cotangent)[0]

  return both


def logits_of_every_kind(n, count):
  """Random of three spreads, three-valued, permutations, ties, triangular."""
  rng = np.random.default_rng(n)
  shape = (count // 8, n, n)
  permutations = np.stack([rng.permutation(n) for _ in range(shape[0])])
  upper = np.triu(np.ones((n, n)))
  kinds = [
    *(rng.normal(size=shape) * std for std in (1, 5, 20)),
    rng.choice([-50.0, 0.0, 50.0], size=shape),
    100.0 * (permutations[..., None] == np.arange(n)) - 50,
    np.zeros(shape) + rng.normal(size=(shape[0], 1, 1)),
    np.where(upper, rng.normal(size=shape), -80.0),
    np.where(upper.T, 0.0, rng.choice([-30.0, -60.0, -100.0], size=shape)),
  ]
  return np.concatenate(kinds).astype(np.float32)


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def value_and_pullback(eps, backward):
  def both(logits, cotangent):
    out, vjp = jax.vjp(
      lambda x: manifold.sinkhorn_project(x, 20, eps, backward), logits
    )
    return out, vjp(cotangent)[0]

  return jax.jit(both)


OFTEN = [(1, 0.0), (3, 0.0), (4, 1e-6)]
SELDOM = [(2, 0.0), (4, 0.0), (8, 0.0), (1, 1e-6)]


@pytest.mark.parametrize(
  ('n', 'eps'),
  [*OFTEN, *(pytest.param(*each, marks=pytest.mark.slow) for each in SELDOM)],
)
def test_forward_and_gradients_match_the_oracle(n, eps):
  logits = logits_of_every_kind(n, 2048)
  cotangent = np.random.default_rng(1).normal(size=logits.shape)
  cotangent = cotangent.astype(np.float32)
  want, want_grad = oracle(logits, cotangent, 20, eps)
  for backward in ('recompute', 'unrolled'):
    out, grad = value_and_pullback(eps, backward)(logits, cotangent)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=2e-6)
  _, grad = value_and_pullback(eps, 'implicit')(logits, cotangent)
  assert np.isfinite(grad).all()
  if n > 1:
    assert np.abs(want_grad).max() > 0.5  # the comparison has something to see


@pytest.mark.parametrize('backward', ['recompute', 'unrolled', 'implicit'])
@pytest.mark.parametrize('std', [100.0, 1000.0])
def test_finite_at_absurd_logits(backward, std):
  logits = np.random.default_rng(0).normal(size=(2048, 4, 4)) * std
  logits = logits.astype(np.float32)
  for eps in (0.0, 1e-6):
    out, grad = value_and_pullback(eps, backward)(logits, logits / std)
    assert np.isfinite(out).all()
    assert np.isfinite(grad).all()
    assert (np.asarray(out) >= 0).all()


def test_rows_are_exact_and_columns_carry_the_error():
  logits = 5 * normal(0, (4096, 4, 4))

  @jax.jit
  def residuals_after(logits):
    return [
      manifold.residuals(manifold.sinkhorn_project(logits, num_iters, 0.0))
      for num_iters in (20, 30)
    ]

  (rows, columns), (_, later) = residuals_after(logits)
  assert rows.max() < 5e-7
  assert 1e-3 < columns.max() < 1
  assert later.max() < columns.max()


def test_implicit_is_the_gradient_of_the_limit():
  """Equal to the truncated gradient at convergence, and only there."""
  rng = np.random.default_rng(0)
  errors = {}
  for std in (0.5, 5.0):
    logits = (std * rng.normal(size=(2048, 4, 4))).astype(np.float32)
    cotangent = rng.normal(size=logits.shape).astype(np.float32)
    _, want = oracle(logits, cotangent, 20, 0.0)
    _, grad = value_and_pullback(0.0, 'implicit')(logits, cotangent)
    errors[std] = np.abs(grad - want).max()
  assert errors[0.5] < 1e-5
  assert errors[5.0] > 1e-2


def test_equals_deepseek_comb_transposed():
  """paper order on H is DeepSeek's rows-then-columns on H^T."""
  logits = np.random.default_rng(0).normal(size=(256, 4, 4)) * 6
  comb = np.exp(logits - logits.max(-1, keepdims=True))
  comb = comb / comb.sum(-1, keepdims=True) + 1e-6
  comb = comb / (comb.sum(-2, keepdims=True) + 1e-6)
  for _ in range(19):
    comb = comb / (comb.sum(-1, keepdims=True) + 1e-6)
    comb = comb / (comb.sum(-2, keepdims=True) + 1e-6)
  transposed = jnp.asarray(logits.swapaxes(1, 2), jnp.float32)
  out = manifold.sinkhorn_project(transposed, 20, 1e-6)
  np.testing.assert_allclose(
    np.asarray(out).swapaxes(1, 2), comb, rtol=0, atol=1e-6
  )


def test_axes_and_leading_shapes():
  logits = normal(0, (2, 3, 5, 4, 4))
  project = jax.jit(manifold.sinkhorn_project, static_argnames='axes')
  want = np.asarray(project(logits))
  minor = project(np.moveaxis(logits, (-2, -1), (0, 1)), axes=(0, 1))
  np.testing.assert_array_equal(np.moveaxis(minor, (0, 1), (-2, -1)), want)
  single = project(logits[1, 2, 3])
  np.testing.assert_allclose(single, want[1, 2, 3], rtol=0, atol=1e-7)
  empty = project(logits[:0])
  assert empty.shape == (0, 3, 5, 4, 4)


def test_float32_whatever_comes_in():
  logits = normal(0, (8, 4, 4)).astype(jnp.bfloat16)
  out, gradient = jax.jit(
    lambda x: (lambda out, vjp: (out, vjp(out)[0]))(
      *jax.vjp(manifold.sinkhorn_project, x)
    )
  )(logits)
  assert out.dtype == jnp.float32
  assert gradient.dtype == jnp.bfloat16
  assert manifold.residuals(out)[0].max() < 3e-6


@pytest.mark.parametrize(
  'backward',
  [
    *('recompute', 'implicit'),
    pytest.param('unrolled', marks=pytest.mark.slow),
  ],
)
def test_under_every_transformation(backward):
  """jit, vmap, scan, remat and shard_map give the plain call's gradient."""
  logits, weights = normal(0, (8, 6, 4, 4)), normal(1, (8, 6, 4, 4))

  def loss(x, w):
    return jnp.sum(manifold.sinkhorn_project(x, 5, 1e-6, backward) * w)

  want = jax.grad(loss)(logits, weights)

  def scanned(x, w):
    return jax.lax.scan(
      lambda c, xw: (c + loss(*xw), None), jnp.zeros(()), (x, w)
    )[0]

  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  sharded = jax.shard_map(
    lambda x, w: jax.grad(loss)(x, w),
    mesh=mesh,
    in_specs=(spec, spec),
    out_specs=spec,
  )
  variants = {
    'jit': jax.grad(loss),
    'vmap': jax.vmap(jax.grad(loss)),
    'scan': jax.grad(scanned),
    'remat': jax.grad(jax.checkpoint(loss)),
    'shard_map': sharded,
  }
  gradients = jax.jit(
    lambda *given: {name: each(*given) for name, each in variants.items()}
  )(logits, weights)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-6, err_msg=name)


def test_forward_mode_is_refused_or_right():
  logits, tangent, cotangent = (normal(seed, (3, 4, 4)) for seed in range(3))
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(manifold.sinkhorn_project, (logits,), (tangent,))

  project = functools.partial(manifold.sinkhorn_project, backward='unrolled')
  _, forward = jax.jit(lambda x, t: jax.jvp(project, (x,), (t,)))(
    logits, tangent
  )
  _, gradient = value_and_pullback(0.0, 'recompute')(logits, cotangent)
  np.testing.assert_allclose(
    np.vdot(forward, cotangent), np.vdot(gradient, tangent), rtol=0, atol=1e-6
  )


@pytest.mark.parametrize('backward', ['recompute', 'implicit'])
def test_keeps_one_matrix_for_the_backward_pass(backward):
  count = 1000
  logits = jnp.zeros((count, 4, 4))
  _, vjp = jax.vjp(
    lambda x: manifold.sinkhorn_project(x, backward=backward), logits
  )
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
  assert count * 64 <= kept <= count * 64 + 1024


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(logits=jnp.zeros((3, 4))), r'square.*\(3, 4\)'),
    (dict(logits=jnp.zeros(4)), 'square'),
    (dict(logits=jnp.zeros((2, 0, 0))), 'n >= 1'),
    (dict(num_iters=0), 'num_iters.*0'),
    (dict(eps=-1e-6), 'eps.*-1e-06'),
    (dict(eps=1e-30), 'eps.*1e-30'),
    (dict(backward='adjoint'), 'adjoint'),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  arguments = {'logits': jnp.zeros((4, 4)), **arguments}
  with pytest.raises((ValueError, TypeError), match=message) as error:
    manifold.sinkhorn_project(**arguments)
  if 'backward' not in arguments:
    assert isinstance(error.value, ValueError)
