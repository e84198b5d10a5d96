"""Invariants of each parameterisation, far from and near its initial value."""

import functools
import itertools

import float64
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import axes
from mhc import functional
from mhc import mixing

TOKENS = 500


matrices = jax.jit(mixing.matrices, static_argnums=(0, 2))


def random_matrices(kind, n, std=3.0):
  size = mixing.initial_logits(kind, n).size
  rng = np.random.default_rng(n)
  logits = (std * rng.normal(size=(size, TOKENS))).astype(np.float32)
  # One program, but where it would be of hundreds of steps.
  run = matrices if n < 16 else mixing.matrices
  out = run(kind, jnp.asarray(logits), n)
  assert out.shape == (n, n, TOKENS)
  return np.moveaxis(np.asarray(out), -1, 0)


@pytest.mark.parametrize('std', [1.0, 30.0])
@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize(
  'kind', ['permutations', 'kronecker', 'cyclic', 'tbp', 'go']
)
def test_exactly_doubly_stochastic_without_iterating(kind, n, std):
  h = random_matrices(kind, n, std)
  assert (h >= 0).all()
  np.testing.assert_allclose(h.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(h.sum(2), 1, atol=1e-6)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
def test_cayley_matrices_are_rotations(n):
  h = random_matrices('cayley', n)
  eye = np.broadcast_to(np.eye(n), h.shape)
  np.testing.assert_allclose(h @ h.swapaxes(1, 2), eye, atol=4e-6)
  np.testing.assert_allclose(np.linalg.det(h), 1, atol=4e-6)


@functools.partial(jax.jit, static_argnums=0)
def cayley(n, logits, d_logits, g):
  """The matrices, their change and the gradient."""
  run = lambda logits: mixing.cayley(logits, n)
  got, pull_back = jax.vjp(run, logits)
  _, d_got = jax.jvp(run, (logits,), (d_logits,))
  return got, d_got, pull_back(g)[0]


@pytest.mark.parametrize('std', [1.0, 5.0, 20.0])
@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
def test_cayley_and_its_gradient_are_exact_at_large_logits(n, std):
  """Against float64, of each token: forward mode, reverse mode, A A^T = I."""
  generator = np.random.default_rng(n)
  size, above = n * (n - 1) // 2, np.triu_indices(n, 1)
  logits, d_logits = (
    generator.normal(size=(size, 5000)).astype(np.float32) for _ in range(2)
  )
  logits = (std * logits).astype(np.float32)
  g = generator.normal(size=(n, n, 5000)).astype(np.float32)

  def skew(logits):
    s = np.zeros((5000, n, n))
    s[:, *above] = logits.T
    return s - s.swapaxes(1, 2)

  inverse = np.linalg.inv(np.eye(n) + skew(logits))
  want = 2 * inverse - np.eye(n)
  d_want = -2 * inverse @ skew(d_logits) @ inverse
  g_skew = (
    inverse.swapaxes(1, 2) @ g.transpose(2, 0, 1) @ inverse.swapaxes(1, 2)
  )
  g_want = -2 * (g_skew - g_skew.swapaxes(1, 2))[:, *above].T

  got, d_got, gradient = cayley(n, logits, d_logits, g)
  for a, b, scale in (
    (got, want.transpose(1, 2, 0), 1),
    (d_got, d_want.transpose(1, 2, 0), np.abs(d_want).max(initial=1)),
    (gradient, g_want, np.abs(g_want).max(initial=1)),
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * scale)
  h = np.asarray(got).transpose(2, 0, 1)
  np.testing.assert_allclose(
    h @ h.swapaxes(1, 2), np.broadcast_to(np.eye(n), h.shape), atol=6e-6
  )


@pytest.mark.parametrize(
  'kind', ['permutations', 'kronecker', 'cyclic', 'tbp', 'go', 'cayley']
)
def test_the_matrix_of_one_stream_varies_over_devices_as_logits_do(kind):
  def matrix(logits):
    out = mixing.matrices(kind, logits, 1)
    assert axes.varying_axes(out) == {'data'}
    return out

  size = mixing.initial_logits(kind, 1).size
  over_devices = jax.shard_map(
    matrix,
    mesh=jax.make_mesh((2,), ('data',), (AxisType.Auto,)),
    in_specs=P(None, 'data'),
    out_specs=P(None, None, 'data'),
  )
  logits = jax.ShapeDtypeStruct((size, TOKENS), jnp.float32)
  assert jax.eval_shape(over_devices, logits).shape == (1, 1, TOKENS)


def test_permutations_reach_every_vertex_and_kronecker_does_not():
  vertices = 100.0 * jnp.eye(24)  # one logit dominates
  h = np.asarray(mixing.permutations(vertices, 4))
  found = {tuple(h[:, :, k].argmax(1)) for k in range(24)}
  assert len(found) == 24
  np.testing.assert_allclose(h.max(1), 1, atol=1e-6)
  corners = (
    100.0
    * jnp.array(
      [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], jnp.float32
    ).T
  )
  h = np.asarray(mixing.kronecker(corners, 4))
  found = {tuple(h[:, :, k].argmax(1)) for k in range(4)}
  assert found == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}


def rotation(logits, m):
  """(I - S)(I + S)^-1 of one token, float64."""
  s = np.zeros((m, m))
  s[np.triu_indices(m, 1)] = logits
  s = s - s.T
  return (np.eye(m) - s) @ np.linalg.inv(np.eye(m) + s)


def go_of(logits, n, s):
  """Eq. of go-mHC, block by block."""
  q = rotation(logits, n * s)
  by_block = np.arange(n * s).reshape(n, s).T.reshape(-1)
  q = q[np.ix_(by_block, by_block)]  # the rows of block i are i, i + n, ...
  sums = [[(q[i::n] ** 2)[:, j::n].sum() for j in range(n)] for i in range(n)]
  return np.array(sums) / s


def cyclic_of(logits, n, s):
  weights = np.exp(logits - logits.max())
  shift = np.roll(np.eye(n), 1, axis=0)
  power = [np.linalg.matrix_power(shift, k) for k in range(n)]
  return sum(w / weights.sum() * p for w, p in zip(weights, power, strict=True))


def tbp_of(logits, n, s):
  """Each entry between its bounds, which an inner loop finds."""
  h = np.zeros((n, n))
  for i, j in np.ndindex(n, n):
    row, column = 1 - h[i, :j].sum(), 1 - h[:i, j].sum()
    later = sum(1 - h[:i, k].sum() for k in range(j + 1, n))
    low, high = max(0.0, row - later), min(row, column)
    share = 0.0
    if i < n - 1 and j < n - 1:
      share = 1 / (1 + np.exp(-logits[i * (n - 1) + j]))
    h[i, j] = low + share * (high - low)
  return h


ORACLES = {'go': go_of, 'cyclic': cyclic_of, 'tbp': tbp_of}
CASES = [('go', 4, 2), ('go', 3, 1), ('go', 2, 3), ('cyclic', 5, 0)]
CASES += [('tbp', 4, 0), ('tbp', 3, 0), ('tbp', 2, 0)]


@functools.cache
def compiled(kind, n, s):
  """Matrices and their gradient in one program, as training compiles them.

  Compiled apart, they hid a compiler that is wrong about both together.
  """

  @jax.jit
  def both(x, g):
    out, back = jax.vjp(lambda x: mixing.matrices(kind, x, n, go_size=s), x)
    return out, back(g)[0]

  return both


@pytest.mark.parametrize('std', [0.3, 5.0])
@pytest.mark.parametrize(('kind', 'n', 's'), CASES)
def test_the_formula(kind, n, s, std):
  oracle = ORACLES[kind]
  size = mixing.initial_logits(kind, n, go_size=max(s, 1)).size
  rng = np.random.default_rng(0)
  logits = std * rng.normal(size=(size, 6))
  g = rng.normal(size=(n, n, 6))
  got, gradient = compiled(kind, n, s)(
    jnp.asarray(logits, jnp.float32), jnp.asarray(g, jnp.float32)
  )
  logits = np.float64(float64.DTYPE(logits))
  for token in range(6):
    want = oracle(logits[:, token], n, s)
    within = float64.tolerance(1e-6)
    np.testing.assert_allclose(got[..., token], want, atol=within)
    direction = rng.normal(size=size)
    here, step = logits[:, token], 1e-6 * direction
    change = oracle(here + step, n, s) - oracle(here - step, n, s)
    change = (change / 2e-6 * g[..., token]).sum()
    found = float(np.float64(gradient[:, token]) @ direction)
    np.testing.assert_allclose(found, change, rtol=1e-4, atol=3e-5)


def test_many_streams():
  """Sixteen of them, in plain JAX."""
  for kind in ('sinkhorn', 'cyclic', 'tbp', 'go'):
    h = random_matrices(kind, 16, std=1.0)
    np.testing.assert_allclose(h.sum(2), 1, atol=1e-6)
    np.testing.assert_allclose(
      h.sum(1), 1, atol=1e-6 if kind != 'sinkhorn' else 1e-3
    )


def test_nothing_is_scattered_for_one_stream():
  """A training step on two devices crashed the compiler by it."""
  logits = jnp.zeros((0, 5))
  run = jax.value_and_grad(lambda x: jnp.sum(mixing.cayley(x, 1)))
  assert 'scatter' not in str(jax.make_jaxpr(run)(logits))
  value, gradient = jax.jit(run)(logits)
  assert (value, gradient.shape) == (5, (0, 5))


def test_a_compiler_computes_each_entry_of_tbp_once():
  """Fused, n = 8 took a time that nobody waited for."""
  n, tokens = 8, 4
  logits = jnp.zeros(((n - 1) ** 2, tokens))
  program = jax.jit(jax.grad(lambda x: jnp.sum(mixing.transport(x, n) ** 2)))
  compiled = program.lower(logits).compile()
  assert compiled.cost_analysis()['flops'] < 50 * n**3 * tokens
  assert jnp.isfinite(compiled(logits)).all()


def test_tbp_reaches_every_vertex_and_any_matrix():
  h = np.asarray(mixing.transport(jnp.asarray(SHARES_OF_VERTICES), 4))
  found = {tuple(h[:, :, k].argmax(1)) for k in range(h.shape[2])}
  assert len(found) == 24
  np.testing.assert_allclose(h.max(1), 1, atol=1e-6)
  # The shares of a matrix, read off it, give it back.
  want = random_matrices('permutations', 4)[:50]
  shares = np.stack([shares_of(each) for each in np.float64(want)], axis=-1)
  logits = np.log(shares / (1 - shares))
  h = mixing.transport(jnp.asarray(logits, jnp.float32), 4)
  np.testing.assert_allclose(np.moveaxis(h, -1, 0), want, atol=2e-6)


def shares_of(h):
  """Where between its bounds each entry of a matrix lies."""
  n, shares = len(h), []
  for i, j in np.ndindex(n - 1, n - 1):
    row, columns = 1 - h[i, :j].sum(), 1 - h[:i].sum(0)
    low = max(0.0, row - columns[j + 1 :].sum())
    shares.append((h[i, j] - low) / (min(row, columns[j]) - low))
  return np.clip(shares, 1e-9, 1 - 1e-9)


# Rows choose a column each by shares of 0 and 1; what is not free is not used.
SHARES_OF_VERTICES = 100 * np.float32(
  np.array([*itertools.product((-1, 1), repeat=9)]).T
)


def test_go_has_a_gradient_where_it_starts():
  logits = mixing.initial_logits('go', 4)[:, None]
  of = jax.jit(jax.grad(lambda x: mixing.go(x, 4)[0, 1, 0]))
  gradient = of(logits)
  assert np.abs(gradient).max() > 1e-3
  gradient = of(0 * logits)
  assert not gradient.any()


@pytest.mark.parametrize(
  'kind', ['sinkhorn', 'permutations', 'kronecker', 'cyclic', 'tbp', 'go']
)
def test_initial_matrices_are_doubly_stochastic_and_near_the_identity(kind):
  logits = mixing.initial_logits(kind, 4)[:, None]
  h = np.asarray(mixing.matrices(kind, logits, 4))[..., 0]
  np.testing.assert_allclose(h.sum(0), 1, atol=1e-6)
  np.testing.assert_allclose(h.sum(1), 1, atol=1e-6)
  off = 0.006 if kind == 'tbp' else 0.002  # what rows leave adds up
  np.testing.assert_allclose(np.diag(h), 0.994, atol=off)


def test_cayley_and_identity_start_at_the_identity():
  for kind in ('cayley', 'identity'):
    logits = mixing.initial_logits(kind, 4)[:, None]
    h = mixing.matrices(kind, logits, 4)
    np.testing.assert_array_equal(h[..., 0], jnp.eye(4))


@pytest.mark.parametrize('kind', ['permutations', 'kronecker'])
def test_the_start_of_the_authors_code(kind):
  """-1 but +1 at the home stream, for H_pre and H_post; 0 and -8 for H_res."""
  params = functional.init(8, 4, 6, kind, init='authors')
  home = [-1, -1, 1, -1]
  np.testing.assert_array_equal(params['bias'][:8], home * 2)
  logits = np.asarray(params['bias'][8:])
  if kind == 'permutations':
    np.testing.assert_array_equal(logits, [0] + [-8] * 23)
  else:
    np.testing.assert_array_equal(logits, [0, -8] * 2)
  h = mixing.matrices(kind, jnp.asarray(logits)[:, None], 4)[..., 0]
  np.testing.assert_allclose(np.diag(h), 1, atol=0.01)
  for name in ('sinkhorn', 'cayley'):
    with pytest.raises(ValueError, match=f"init='authors' is for.*{name}"):
      functional.init(8, 4, 6, name, init='authors')


def test_impossible_sizes_are_named():
  with pytest.raises(ValueError, match='6 streams'):
    mixing.initial_logits('permutations', 6)
  with pytest.raises(ValueError, match=r'power of two.*3'):
    mixing.initial_logits('kronecker', 3)
