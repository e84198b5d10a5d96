"""Frac-Connections against float64, and what they start as."""

from flax import nnx
import float64
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import config as config_lib
from mhc import observation
from mhc.connections import frac
from mhc.parallel import counts

DIM, M, TOKENS = 6, 3, 5
NAMES = (
  *('gain', 'theta_pre', 'theta_res', 'theta_post', 'alpha'),
  *('bias_pre', 'bias_res', 'bias_post'),
)


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(float64.DTYPE)


def oracle(x, gain, theta_pre, theta_res, theta_post, alpha, *biases):
  """Sec. 3 of 2503.14125, token by token and fraction by fraction."""
  bias_pre, bias_res, bias_post = biases
  out = []
  for token in x[:, 0]:
    parts = token.reshape(M, -1)
    normed = parts / np.sqrt((parts**2).mean(1, keepdims=True)) * gain
    pre = alpha[0] * np.tanh(theta_pre @ normed.T) + bias_pre
    res = alpha[0] * np.tanh(theta_res @ normed.T) + bias_res
    post = alpha[1] * np.tanh(normed @ theta_post) + bias_post
    y = np.sin((pre @ parts).reshape(-1)).reshape(M, -1)
    out.append((res @ parts + post[:, None] * y).reshape(1, -1))
  return np.stack(out)


def ours(x, *params):
  module = frac.Frac(DIM, M, 0)
  for name, value in zip(NAMES, params, strict=True):
    getattr(module, name)[...] = value
  h, context = module.pre(x)
  return module.post(jnp.sin(h), context)


def arguments():
  shapes = [leaf.shape for leaf in frac.Frac(DIM, M, 0).params.values()]
  params = [numbers(*shape, seed=k) for k, shape in enumerate(shapes)]
  return numbers(TOKENS, 1, DIM, seed=20), *params


def test_the_formula():
  """The result, and the gradient with respect to everything."""
  given, g = arguments(), numbers(TOKENS, 1, DIM, seed=21)
  found, back = jax.vjp(jax.jit(ours), *map(jnp.asarray, given))
  wide = [np.float64(each) for each in given]
  within = float64.tolerance(2e-6)
  np.testing.assert_allclose(found, oracle(*wide), rtol=within, atol=within)
  within = float64.tolerance(3e-5, 1e-6)
  rng = np.random.default_rng(0)
  for number, gradient in enumerate(back(jnp.asarray(g))):
    direction = rng.normal(size=wide[number].shape)
    ends = []
    for step in (1e-5, -1e-5):
      moved = [*wide]
      moved[number] = moved[number] + step * direction
      ends.append((oracle(*moved) * g).sum())
    want = (ends[0] - ends[1]) / 2e-5
    got = (np.float64(gradient) * direction).sum()
    np.testing.assert_allclose(got, want, rtol=within, atol=within)


def test_starts_as_the_plain_residual():
  module, x = frac.Frac(DIM, M, 3), jnp.asarray(numbers(TOKENS, 1, DIM))
  h, context = module.pre(x)
  np.testing.assert_allclose(h, x[:, 0], rtol=1e-6)
  y = jnp.sin(h)
  np.testing.assert_allclose(module.post(y, context), x + y[:, None], rtol=1e-6)


def test_probes_see_its_fractions_as_streams():
  module, x = frac.Frac(DIM, M, 0), jnp.asarray(numbers(TOKENS, 1, DIM))
  stats = observation.observe(lambda x: module.pre(x)[0], x).stats
  assert stats.res.shape == (1, TOKENS, M, M)
  np.testing.assert_allclose(stats.pre, 1 / M, rtol=1e-6)


@pytest.mark.parametrize('split', [P('data'), P(None, None, 'data')])
def test_an_explicit_mesh_gives_the_same(split):
  given = arguments()
  mesh = jax.make_mesh((2,), ('data',), (AxisType.Explicit,))
  x = jnp.tile(given[0], (2, 1, 1))
  loss = lambda x, *params: jnp.sum(jnp.sin(ours(x, *params)))
  every = tuple(range(len(given)))
  want = jax.jit(jax.grad(loss, every))(x, *given[1:])
  with jax.set_mesh(mesh):
    placed = jax.device_put(x, NamedSharding(mesh, split))
    found = jax.jit(jax.grad(loss, every))(placed, *given[1:])
  for one, other in zip(found, want, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_parameters_are_counted_to_the_digit():
  model = config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig(kind='frac', num_streams=4)
  )
  plain, found = (counts.count(m, 16) for m in (model.plain, model))
  own = 8 * (16 * 10 + 2 * 16 + 4 + 2)
  assert found['total_params'] - plain['total_params'] == own
  assert found['connection_params'] == own
  assert model.connection.streams == 1


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='4 fractions do not divide dim=6'):
    frac.Frac(DIM, 4, 0)
  with pytest.raises(ValueError, match=r'num_streams=5 of frac must divide'):
    config_lib.ModelConfig(
      connection=config_lib.ConnectionConfig(kind='frac', num_streams=5)
    )
  with pytest.raises(ValueError, match=r'pre=.* would not be used'):
    config_lib.ConnectionConfig(kind='frac', pre='off')
  module = frac.Frac(DIM, M, 0)
  with pytest.raises(ValueError, match=r'has 1 streams of width 6, got'):
    module.pre(jnp.ones((TOKENS, 2, DIM)))
  _, context = module.pre(jnp.ones((TOKENS, 1, DIM)))
  with pytest.raises(ValueError, match='must return'):
    module.post(jnp.ones((TOKENS, DIM - 3)), context)


def test_it_is_a_module_like_the_others():
  graph, state = nnx.split(frac.Frac(DIM, M, 0))
  assert hash(graph) == hash(nnx.split(frac.Frac(DIM, M, 0))[0])
  assert set(nnx.to_pure_dict(state)) == set(NAMES)
