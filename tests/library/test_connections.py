"""Connections against a float64 transcription of the papers' formulas."""

import functools
import itertools

import double_precision
from flax import nnx
import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc import connections
from mhc import observation
from mhc import streams
from mhc.model import residual

DIM = 6
KINDS = tuple(
  kind
  for kind in config.KINDS
  if kind
  not in ('mhc_single_pass', 'wide_residual', 'frac', *config.DEPTH_KINDS)
)
EXACT = ('mhc_lite', 'kromhc', 'orthogonal', 'cyclic', 'tbp', 'go')


def make(kind, num_streams=4, index=0, **options):
  settings = config.ConnectionConfig(
    kind=kind, num_streams=num_streams, **options
  )
  return residual.make_connection(
    settings, DIM, index, norm_eps=1e-20, depth=8, is_first=True
  )


def perturbed(module, scale=0.5, seed=0):
  """Away from the initial values, where many gradients vanish."""
  leaves, tree = jax.tree.flatten(module)
  keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
  return jax.tree.unflatten(
    tree,
    [
      leaf + scale * jax.random.normal(key, leaf.shape)
      for leaf, key in zip(leaves, keys, strict=False)
    ],
  )


def random_streams(num_streams=4, dtype=jnp.float32, seed=1):
  shape = (2, 5, num_streams, DIM)
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def sublayer(connection, x):
  """A connection around the sub-layer y = sin(h): smooth, not linear."""
  h, context = connection.pre(x)
  return connection.post(jnp.sin(h), context)


def reference_mixing(kind, logits, n):
  if kind == 'mhc_lite':
    weights = jnp.exp(logits) / jnp.exp(logits).sum()
    h_res = jnp.zeros((n, n))
    for weight, target in zip(
      weights, itertools.permutations(range(n)), strict=True
    ):
      h_res = h_res.at[np.arange(n), np.array(target)].add(weight)
    return h_res
  if kind == 'kromhc':
    h_res = jnp.ones((1, 1))
    for pair in logits.reshape(-1, 2):
      keep, swap = jnp.exp(pair) / jnp.exp(pair).sum()
      h_res = jnp.kron(h_res, jnp.array([[keep, swap], [swap, keep]]))
    return h_res
  if kind == 'cyclic':
    weights = jnp.exp(logits) / jnp.exp(logits).sum()
    shifts = [jnp.roll(jnp.eye(n), k, axis=0) for k in range(n)]
    return sum(w * shift for w, shift in zip(weights, shifts, strict=True))
  if kind == 'tbp':
    h = jnp.zeros((n, n))
    for i, j in np.ndindex(n, n):
      row, columns = 1 - h[i, :j].sum(), 1 - h[:i].sum(0)
      low = jnp.maximum(0, row - columns[j + 1 :].sum())
      share = 0.0
      if max(i, j) < n - 1:
        share = 1 / (1 + jnp.exp(-logits[i * (n - 1) + j]))
      high = jnp.minimum(row, columns[j])
      h = h.at[i, j].set(low + share * (high - low))
    return h
  m = 2 * n if kind == 'go' else n
  skew = jnp.zeros((m, m)).at[np.triu_indices(m, 1)].set(logits)
  skew, eye = skew - skew.T, jnp.eye(m)
  rotation = (eye - skew) @ jnp.linalg.inv(eye + skew)
  if kind == 'go':
    return (rotation**2).reshape(n, 2, n, 2).sum((1, 3)) / 2
  return rotation


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(function, parameters, x, cotangent):
  out, vjp = jax.vjp(function, parameters, x)
  return out, vjp(cotangent)


def reference_mappings(kind, params, x):
  """H_pre [n], H_post [n] and H_res [n, n] of one token's streams, as printed.

  By Eq. 5 for HC, by Eq. 7-9 for mHC and its other mixings.
  """
  n, dim = x.shape
  columns, rows = (lambda h, i=i: h / h.sum(i, keepdims=True) for i in (0, 1))

  def rms_norm(v, axis):
    return v / jnp.sqrt(jnp.mean(v * v, axis=axis, keepdims=True))

  if kind == 'hc':
    normed = rms_norm(x, -1) * params['gain'][None]
    width, depth = params['alpha']
    h_pre = width * jnp.tanh(normed @ params['theta_pre'])
    h_post = depth * jnp.tanh(normed @ params['theta_post'])
    h_res = width * jnp.tanh(params['theta_res'] @ normed.T)
    return (
      h_pre + params['bias_pre'],
      h_post + params['bias_post'],
      h_res + params['bias_res'],
    )
  raw = rms_norm(x.reshape(n * dim), -1) @ params['phi']
  sizes = [n, n, len(params['bias']) - 2 * n][: len(params['alpha'])]
  parts = jnp.split(raw, np.cumsum(sizes)[:-1])
  scaled = [
    alpha * part for alpha, part in zip(params['alpha'], parts, strict=True)
  ]
  logits = jnp.concatenate(scaled) + params['bias']
  h_pre = 1 / (1 + jnp.exp(-logits[:n]))
  h_post = 2 / (1 + jnp.exp(-logits[n : 2 * n]))
  h_res = jnp.eye(n)
  if kind == 'mhc':
    h_res = jnp.exp(logits[2 * n :].reshape(n, n))
    h_res = jax.lax.scan(
      lambda h, _: (rows(columns(h)), None), h_res, length=20
    )[0]
  elif len(sizes) == 3:
    h_res = reference_mixing(kind, logits[2 * n :], n)
  return h_pre, h_post, h_res


def reference_site(kind, params, x):
  """Eq. 3 around the sub-layer y = sin(h), token by token."""

  def token(x):
    h_pre, h_post, h_res = reference_mappings(kind, params, x)
    return h_res @ x + h_post[:, None] * jnp.sin(h_pre @ x)[None]

  return jax.vmap(token)(x.reshape(-1, *x.shape[-2:])).reshape(x.shape)


def reference_single_pass(params, x):
  """x <- B_l x + C_l F(A_l-1 x) from the embedding on, closed by the last A."""

  def token(x):
    x, read_by = jnp.tile(x[None], (4, 1)), jnp.eye(4)[0]
    for of_sublayer in params:
      y = jnp.sin(read_by @ x)
      read_by, h_post, h_res = reference_mappings('mhc', of_sublayer, x)
      x = h_res @ x + h_post[:, None] * y[None]
    return read_by @ x

  return jax.vmap(token)(x.reshape(-1, DIM)).reshape(x.shape)


def in_float64(reference, params, x, cotangent):
  """The reference's result, and its gradients of params and x."""
  with double_precision.x64():
    wide = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x, cotangent)
    )
    return jax.tree.map(np.asarray, value_and_pullback(reference, *wide))


@pytest.mark.parametrize(
  ('kind', 'num_streams'),
  [
    *((kind, 4) for kind in ('hc', 'mhc', 'identity', *EXACT[:3])),
    ('mhc', 1),
    *(
      pytest.param(kind, 1, marks=pytest.mark.slow)
      for kind in ('hc', 'identity', *EXACT)
    ),
    # Their matrices are tested by themselves.
    *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in EXACT[3:]),
  ],
)
def test_the_formula_and_all_gradients(kind, num_streams):
  connection = perturbed(make(kind, num_streams))
  params = nnx.to_pure_dict(nnx.state(connection))
  x = random_streams(num_streams)
  cotangent = random_streams(num_streams, seed=2)
  out, (grads, d_x) = value_and_pullback(sublayer, connection, x, cotangent)
  want, (want_grads, want_d_x) = in_float64(
    functools.partial(reference_site, kind), params, x, cotangent
  )
  near, rtol = float64.tolerance(2e-5), float64.tolerance(1e-5)
  np.testing.assert_allclose(out, want, rtol=0, atol=float64.tolerance(5e-6))
  np.testing.assert_allclose(d_x, want_d_x, rtol=0, atol=near)
  got = nnx.to_pure_dict(nnx.state(grads))
  assert got.keys() == want_grads.keys()
  for name, value in got.items():
    np.testing.assert_allclose(
      value, want_grads[name], rtol=rtol, atol=near, err_msg=name
    )


def test_residual_is_x_plus_y():
  x = random_streams(1)
  out = sublayer(make('residual'), x)
  np.testing.assert_array_equal(out, x + jnp.sin(x))


@pytest.mark.parametrize(
  ('kind', 'count'),
  [
    ('residual', 0),
    ('hc', DIM + DIM * (4 + 2) + 4 * (4 + 2) + 2),
    ('mhc', 4 * DIM * 24 + 24 + 3),
    ('identity', 4 * DIM * 8 + 8 + 2),
    ('mhc_lite', (4 * DIM + 1) * (8 + 24) + 3),
    ('kromhc', (4 * DIM + 1) * (8 + 4) + 3),
    ('orthogonal', (4 * DIM + 1) * (8 + 6) + 3),
    ('cyclic', (4 * DIM + 1) * (8 + 4) + 3),
    ('tbp', (4 * DIM + 1) * (8 + 9) + 3),
    ('go', (4 * DIM + 1) * (8 + 28) + 3),
    ('mhc_single_pass', 4 * DIM * 24 + 24 + 3),
  ],
)
def test_parameter_counts(kind, count):
  assert sum(leaf.size for leaf in jax.tree.leaves(make(kind))) == count


def test_papers_initial_mappings():
  x = random_streams().reshape(-1, 4, DIM)
  mappings = make('mhc', index=6).mappings(x)
  initial = np.full(4, 0.04742587)
  initial[6 % 4] = 0.95257413
  np.testing.assert_allclose(mappings.pre[:, 0], initial, atol=1e-6)
  np.testing.assert_allclose(mappings.post, 1, atol=1e-6)
  res = np.asarray(mappings.res[..., 0])
  np.testing.assert_allclose(np.diag(res), 0.99262, atol=1e-5)
  np.testing.assert_allclose(res[0, 1], 0.00246, atol=1e-5)
  hc = make('hc', index=6).mappings(x)
  np.testing.assert_array_equal(hc.pre[:, 0], [0, 0, 1, 0])
  np.testing.assert_array_equal(hc.post, jnp.ones((4, 10)))
  np.testing.assert_array_equal(hc.res[..., 0], jnp.eye(4))


@pytest.mark.parametrize('eps', [0.0, 1e-6])
def test_mixing_is_doubly_stochastic_and_the_gates_are_positive(eps):
  connection = perturbed(make('mhc', sinkhorn_eps=eps), scale=2.0)
  mappings = connection.mappings(100 * random_streams().reshape(-1, 4, DIM))
  rows = jnp.sum(mappings.res, axis=1)
  np.testing.assert_allclose(rows, 1, atol=1e-5)
  assert (mappings.res >= 0).all()
  assert (mappings.pre > 0).all()
  assert (mappings.post > 0).all()


@jax.jit
def seen_by_a_probe(connection, x):
  h, context = connection.pre(x)
  assert residual.read_weights(connection, x, context) is (
    context.mappings and context.mappings.pre
  )
  return h, observation.stream_stats(*context)


def test_what_a_probe_sees_of_every_kind():
  for kind in KINDS:
    n = 1 if kind == 'residual' else 4
    x = random_streams(n)
    h, stats = seen_by_a_probe(make(kind), x)
    matrices, pre, post, cosine, rms = stats
    want = np.einsum('tj,tjd->td', np.float64(pre), x.reshape(10, n, -1))
    np.testing.assert_allclose(h.reshape(10, -1), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(post, np.ones((10, n)), rtol=1e-6)
    x = np.float64(x).reshape(10, n, -1)
    np.testing.assert_allclose(
      rms, np.sqrt((x**2).mean(axis=(1, 2))), rtol=1e-6
    )
    want = np.ones(10)
    if n > 1:
      unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
      cosines = unit @ unit.swapaxes(1, 2)
      want = cosines[:, ~np.eye(n, dtype=bool)].mean(axis=1)
    np.testing.assert_allclose(cosine, want, atol=1e-6)
    assert matrices.shape == (10, n, n)
    if kind in ('residual', 'hc', 'identity', 'orthogonal'):
      eye = jnp.broadcast_to(jnp.eye(n), (10, n, n))
      np.testing.assert_array_equal(matrices, eye)


@pytest.mark.parametrize(
  'kind',
  [
    *('residual', 'hc', 'mhc'),
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in ('identity', *EXACT)  # MHC too, with float32 logits
    ),
  ],
)
def test_bfloat16_streams_keep_float32_mappings(kind):
  n = 1 if kind == 'residual' else 4
  connection = perturbed(make(kind))
  x = random_streams(n, jnp.bfloat16)
  h, context = connection.pre(x)
  out = connection.post(jnp.sin(h), context)
  assert h.dtype == out.dtype == jnp.bfloat16
  if context.mappings is not None:
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(context.mappings)}
    assert dtypes == {jnp.dtype(jnp.float32)}
  wide = sublayer(connection, x.astype(jnp.float32))
  np.testing.assert_allclose(
    out.astype(jnp.float32), wide, rtol=0.02, atol=0.02
  )
  grads = jax.grad(lambda c: jnp.sum(sublayer(c, x).astype(jnp.float32) ** 2))(
    connection
  )
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    assert np.isfinite(leaf).all()


def single_pass(sublayers, x):
  """Sub-layers one after the other, from the embedding on, and closed."""
  settings = config.ConnectionConfig(kind='mhc_single_pass')
  state = residual.expand_streams(settings, x)
  for sublayer in sublayers:
    h, context = residual.begin_sublayer(sublayer, state)
    last = residual.PendingOutput(jnp.sin(h), context)
    state = residual.end_block(settings, sublayer, last)
  return residual.collapse_streams(
    settings, state, streams.Collapse('mean', DIM, 4)
  )


def test_the_formula_and_all_gradients_of_single_pass():
  """A sub-layer reads by the weights of the one before."""
  sublayers = [
    perturbed(make('mhc_single_pass', index=index), seed=index)
    for index in range(3)
  ]
  x, cotangent = (random_streams(1, seed=k)[:, :, 0] for k in (3, 4))
  params = [nnx.to_pure_dict(nnx.state(each.next_mhc)) for each in sublayers]
  out, (grads, d_x) = value_and_pullback(single_pass, sublayers, x, cotangent)
  want, (want_grads, want_d_x) = in_float64(
    reference_single_pass, params, x, cotangent
  )
  near = float64.tolerance(1e-5)
  np.testing.assert_allclose(out, want, rtol=0, atol=near)
  np.testing.assert_allclose(d_x, want_d_x, rtol=0, atol=2 * near)
  for got, wanted in zip(grads, want_grads, strict=True):
    got = nnx.to_pure_dict(nnx.state(got.next_mhc))
    for name, value in wanted.items():
      np.testing.assert_allclose(
        got[name], value, rtol=near, atol=2 * near, err_msg=name
      )


def test_advance_is_post_then_pre():
  first, second = perturbed(make('mhc')), perturbed(make('mhc', index=1))
  h, context = first.pre(random_streams())
  y = jnp.sin(h)
  got, after = second.advance(y, context)
  want, wanted = second.pre(first.post(y, context))
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(after.x, wanted.x)


def test_expand_and_collapse():
  x = jax.random.normal(jax.random.key(0), (2, 3, DIM))
  wide = streams.expand(x, 4)
  assert wide.shape == (2, 3, 4, DIM)
  uneven = wide * jnp.arange(4.0)[None, None, :, None]
  for kind, factor in (('sum', 6.0), ('mean', 1.5)):
    collapse = streams.Collapse(kind, DIM, 4)
    np.testing.assert_allclose(collapse(uneven), factor * x, rtol=1e-5)
  learned = streams.Collapse('learned', DIM, 4)
  np.testing.assert_allclose(learned(wide), 4 * 0.500001 * x, rtol=1e-5)
  assert sum(leaf.size for leaf in jax.tree.leaves(learned)) == 4 * DIM * 4 + 5
  grads = jax.grad(lambda c: jnp.sum(jnp.sin(c(random_streams()))))(
    perturbed(learned)
  )
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_a_sublayer_of_another_dtype_is_named():
  connection = make('mhc')
  h, context = connection.pre(random_streams())
  with pytest.raises(ValueError, match=r'bfloat16.*float32'):
    connection.post(h.astype(jnp.bfloat16), context)


def test_streams_of_another_shape_are_named():
  x = random_streams()
  for kind in ('hc', 'mhc', 'identity'):
    with pytest.raises(ValueError, match=r'4 streams of width 6.*expand'):
      make(kind).pre(x[..., 0, :])
    with pytest.raises(ValueError, match='4 streams of width 6'):
      make(kind).pre(random_streams(3))


def test_unknown_choices_are_named():
  with pytest.raises((ValueError, TypeError), match='kayley'):
    connections.MHC(DIM, 4, 0, mixing='kayley')
  with pytest.raises((ValueError, TypeError), match='max'):
    streams.Collapse('max', DIM, 4)
