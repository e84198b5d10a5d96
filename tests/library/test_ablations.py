"""Mappings that are dynamic, static or off (Table 1 of arXiv 2512.24880)."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc import connections
from mhc import functional
from mhc import streams
from mhc.kernels.pallas import launch
from mhc.model import residual
from mhc.training import optimizer

DIM, TOKENS = 6, 5
WORDS = ('dynamic', 'static', 'off')
EVERY = [*itertools.product(WORDS, repeat=3)]
SOME = [WORDS, (*WORDS[1:], WORDS[0]), (WORDS[2], *WORDS[:2])]
KINDS = tuple(
  kind
  for kind in config.KINDS[1:]
  if kind not in ('wide_residual', 'frac', *config.DEPTH_KINDS)
)
ITERS = 3  # of Sinkhorn: few, for the sake of the compiler


def unchecked(kind, pre='dynamic', post='dynamic', res='dynamic', **options):
  """Settings that may be refused: with copies of one stream."""
  options |= dict(pre=pre, post=post, res=res, sinkhorn_iters=ITERS)
  settings = config.ConnectionConfig(kind, expand_scale='random', **options)
  object.__setattr__(settings, 'expand_scale', 'ones')
  return settings


def perturbed(tree, seed=0):
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    structure,
    [
      leaf + jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
      for leaf in leaves
    ],
  )


def make(kind, parts, n):
  settings = unchecked(kind, *parts, num_streams=n)
  return residual.make_connection(
    settings, DIM, 1, norm_eps=1e-20, depth=8, is_first=False
  )


def random(*shape, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


def mhc_reference(kind, params, x, parts):
  """Eq. 14-19, with the constants of Table 1, in float64."""
  n = x.shape[1]
  flat = x.reshape(len(x), -1)
  z = flat @ params['phi'] / np.sqrt(np.mean(flat**2, axis=1, keepdims=True))

  def logits(number, columns):
    scale = params['alpha'][number] * (parts[number] == 'dynamic')
    return (scale * z[:, columns] + params['bias'][columns]).T

  pre = 1 / (1 + np.exp(-logits(0, slice(n))))
  post = 2 / (1 + np.exp(-logits(1, slice(n, 2 * n))))
  if parts[2] == 'off':
    assert len(params['bias']) == 2 * n
    return pre, post, None
  res = np.exp(logits(2, slice(2 * n, None)))
  if kind == 'kromhc':  # of two streams
    return pre, post, np.stack([res, res[::-1]]) / res.sum(0)
  res = res.reshape(n, n, -1)
  for _ in range(ITERS):
    res = res / res.sum(0, keepdims=True)
    res = res / res.sum(1, keepdims=True)
  return pre, post, res


def hc_reference(kind, params, x, parts):
  """Eq. 5, with the constants of Table 1, in float64."""
  normed = x / np.sqrt(np.mean(x**2, axis=2, keepdims=True)) * params['gain']
  width, depth = params['alpha']
  scale = [
    s * (part == 'dynamic')
    for s, part in zip((width, depth, width), parts, strict=True)
  ]
  pre = scale[0] * np.tanh(normed @ params['theta_pre']).T
  post = scale[1] * np.tanh(normed @ params['theta_post']).T
  res = scale[2] * np.tanh(
    np.einsum('tjc,ic->ijt', normed, params['theta_res'])
  )
  return (
    pre + params['bias_pre'][:, None],
    post + params['bias_post'][:, None],
    None if parts[2] == 'off' else res + params['bias_res'][..., None],
  )


@pytest.mark.parametrize(
  ('kind', 'n', 'combinations'),
  [
    ('hc', 1, SOME),
    ('hc', 2, EVERY),
    ('mhc', 1, [('off', 'static', 'off'), ('static', 'off', 'off')]),
    ('mhc', 2, SOME),  # compiles Sinkhorn once a combination
    ('kromhc', 2, EVERY),
  ],
)
def test_mappings_are_the_papers_or_its_constants(kind, n, combinations):
  reference = hc_reference if kind == 'hc' else mhc_reference
  x = random(TOKENS, n, DIM)
  for parts in combinations:
    # Whatever the parameters of a part that does not use them are.
    connection = perturbed(make(kind, parts, n))
    params = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(connection)))
    want = list(reference(kind, params, np.float64(x), parts))
    for number, constant in enumerate((1 / n, 1.0)):
      if parts[number] == 'off':
        want[number] = np.full((n, TOKENS), constant)
    for got, value in zip(connection.mappings(x), want, strict=True):
      assert (got is None) == (value is None), parts
      if got is not None:
        np.testing.assert_allclose(got, value, atol=2e-6, err_msg=str(parts))


@pytest.mark.parametrize(
  'kind', ['identity', 'mhc_lite', 'kromhc', 'orthogonal', 'mhc_single_pass']
)
def test_other_kinds_have_the_same_parts(kind):
  """Static is a phi of zeros in those columns, off is its own constant."""
  n, x = 2, random(TOKENS, 2, DIM)
  for parts in SOME:
    if kind == 'identity':
      parts = (*parts[:2], 'dynamic')
    connection = perturbed(make(kind, parts, n))
    connection = getattr(connection, 'next_mhc', connection)
    pre, post, res = connection.mappings(x)
    phi = connection.phi[...]
    for number, part in enumerate(parts):
      if part != 'dynamic':
        first, last = number * n, (number + 1) * n if number < 2 else None
        phi = phi.at[:, first:last].set(0.0)
    params = connection.params | {'phi': phi}
    mixing = connection.options.mixing_used
    options = functional.Options(mixing, sinkhorn_iters=ITERS)
    want = functional.mappings(params, x, options)
    if parts[0] != 'off':
      np.testing.assert_array_equal(pre, want.pre)
    if parts[1] != 'off':
      np.testing.assert_array_equal(post, want.post)
    assert (res is None) == (kind == 'identity' or parts[2] == 'off')
    if res is not None:
      np.testing.assert_array_equal(res, want.res)


def frozen(kind, parts, n):
  """Which entries of each parameter do not train, as masks."""
  static = [part != 'dynamic' for part in parts]
  off = [part == 'off' for part in parts]
  if kind == 'hc':
    return {
      'theta_pre': static[0],
      'theta_post': static[1],
      'theta_res': static[2],
      'alpha': np.array([static[0] and static[2], static[1]]),
      'bias_pre': off[0],
      'bias_post': off[1],
      'bias_res': off[2],
    }
  sizes = (n, n, 0 if off[2] else 2)  # two logits for two streams
  return {
    'phi': np.repeat(static, sizes)[None],
    'alpha': np.array(static[: 2 if off[2] else 3]),
    'bias': np.repeat(off, sizes),
  }


@pytest.mark.parametrize('kind', ['hc', 'kromhc'])
def test_what_is_constant_gets_no_gradient_and_the_rest_does(kind):
  n, x, cotangent = 2, random(TOKENS, 2, DIM), random(TOKENS, 2, DIM, seed=1)

  def loss(connection):
    h, context = connection.pre(x)
    return jnp.sum(cotangent * connection.post(jnp.sin(h), context))

  for parts in SOME:
    grads = jax.grad(loss)(perturbed(make(kind, parts, n)))
    grads = nnx.to_pure_dict(nnx.state(grads))
    for name, mask in frozen(kind, parts, n).items():
      np.testing.assert_array_equal(
        grads[name] == 0,
        np.broadcast_to(mask, grads[name].shape),
        err_msg=f'{parts} {name}',
      )


@pytest.mark.usefixtures('optax_promotion')
@pytest.mark.parametrize(
  ('kind', 'name', 'parts'),
  [
    ('kromhc', 'adamw', ('static', 'off', 'dynamic')),
    ('kromhc', 'muon', ('dynamic', 'static', 'off')),
    ('kromhc', 'muon', ('off', 'dynamic', 'static')),
    ('hc', 'muon', ('off', 'dynamic', 'static')),
  ],
)
def test_updates_with_weight_decay_keep_the_constants(kind, name, parts):
  """Nor does Muon, which mixes the rows of phi, put anything in a column."""
  settings = config.OptimizerConfig(name=name, weight_decay=0.5, warmup_steps=0)
  update = optimizer.make(settings, num_steps=10)
  n, x, cotangent = 2, random(TOKENS, 2, DIM), random(TOKENS, 2, DIM, seed=1)
  graph, start = nnx.split(make(kind, parts, n))
  initial = nnx.to_pure_dict(start)

  def loss(params):
    state = jax.tree.map(lambda leaf: leaf, start)
    nnx.replace_by_pure_dict(state, params['dense_blocks']['a_connection'])
    connection = nnx.merge(graph, state)
    h, context = connection.pre(x)
    return jnp.sum(cotangent * connection.post(jnp.sin(h), context))

  @jax.jit
  def step(params, state):
    updates, state = update.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(jnp.add, params, updates), state

  params = {'dense_blocks': {'a_connection': initial}}
  state = update.init(params)
  for _ in range(2):
    params, state = step(params, state)
  for leaf, mask in frozen(kind, parts, n).items():
    same = np.asarray(params['dense_blocks']['a_connection'][leaf])
    same = same == initial[leaf]
    assert same[np.broadcast_to(mask, same.shape)].all(), leaf
    if leaf in ('phi', 'theta_pre', 'theta_post'):
      assert same.all() == np.all(mask), leaf


def unit(h):
  return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)


def network(settings, sublayers, x):
  """The state behind pre-norm sub-layers, each (a connection, weights)."""
  state = residual.expand_streams(settings, x)
  for connection, weight in sublayers:
    h, context = residual.begin_sublayer(connection, state)
    last = residual.PendingOutput(jnp.tanh(unit(h) @ weight), context)
    state = residual.end_block(settings, connection, last)
  return state


def output(settings, sublayers, x):
  collapse = streams.Collapse('mean', x.shape[-1], settings.streams)
  state = network(settings, sublayers, x)
  return unit(residual.collapse_streams(settings, state, collapse))


def initial(settings, dim=DIM, depth=2):
  """Sub-layers with initial connections."""
  return [
    (
      residual.make_connection(
        settings, dim, index, norm_eps=1e-20, depth=8, is_first=True
      ),
      random(dim, dim, seed=index),
    )
    for index in range(depth)
  ]


def test_every_kind_starts_as_the_plain_residual_without_any_part():
  x = random(TOKENS, DIM)
  plain = config.ConnectionConfig('residual')
  want = output(plain, initial(plain), x)
  for kind, parts in itertools.product(
    KINDS,
    (('static',) * 3, ('dynamic', 'off', 'static'), ('off', 'static', 'off')),
  ):
    if kind == 'identity':
      parts = (*parts[:2], 'dynamic')
    settings = unchecked(kind, *parts, num_streams=2)
    np.testing.assert_allclose(
      output(settings, initial(settings), x), want, atol=1e-5
    )


def spread_after_steps(settings, steps=2):
  """How far the streams are apart after gradient steps, relatively."""
  x, cotangent = random(TOKENS, DIM), random(TOKENS, DIM, seed=9)
  sublayers = initial(settings)
  gradient = jax.grad(
    lambda layers: jnp.sum(cotangent * output(settings, layers, x))
  )
  for _ in range(steps):
    sublayers = jax.tree.map(
      lambda leaf, grad: leaf - 0.1 * grad, sublayers, gradient(sublayers)
    )
  state = network(settings, sublayers, x)
  wide = state.x if isinstance(state, connections.StreamsWithPre) else state
  return float(jnp.max(jnp.abs(wide[:, 0] - wide[:, 1])) / jnp.max(wide))


@pytest.mark.parametrize(
  ('kind', 'parts'),
  [
    ('mhc', ('static', 'static', 'off')),
    ('mhc_single_pass', ('static', 'dynamic', 'off')),
    ('hc', ('dynamic', 'off', 'static')),
    ('orthogonal', ('static', 'off', 'dynamic')),
  ],
)
def test_allowed_parts_separate_the_streams(kind, parts):
  pre, post, res = parts
  settings = config.ConnectionConfig(
    kind, num_streams=2, pre=pre, post=post, res=res
  )
  assert spread_after_steps(settings) > 1e-3


@pytest.mark.parametrize(
  ('kind', 'parts'),
  [
    ('kromhc', ('off', 'dynamic', 'dynamic')),
    ('mhc_single_pass', ('off', 'dynamic', 'off')),
    ('hc', ('off', 'dynamic', 'dynamic')),
    ('hc', ('dynamic', 'off', 'off')),
    ('identity', ('dynamic', 'off', 'dynamic')),
  ],
)
def test_refused_parts_keep_them_equal_and_a_random_expansion_does_not(
  kind, parts
):
  pre, post, res = parts
  options = dict(num_streams=2, pre=pre, post=post, res=res)
  with pytest.raises(ValueError, match=r"expand_scale='random'"):
    config.ConnectionConfig(kind, **options)
  assert spread_after_steps(unchecked(kind, **options)) == 0
  settings = config.ConnectionConfig(kind, **options, expand_scale='random')
  assert spread_after_steps(settings) > 1e-3


def test_rows_of_h_res_that_sum_to_one_keep_streams_equal():
  """Up to rounding, which is no training: post='off' alone is refused."""
  settings = unchecked('kromhc', post='off', num_streams=2)
  assert spread_after_steps(settings) < 1e-6


def test_an_unseen_mean():
  """With pre='off' a doubly stochastic H_res leaves what is read as it was."""
  connection = perturbed(make('kromhc', ('off', 'dynamic', 'dynamic'), 2))
  x = random(TOKENS, 2, DIM)
  h, context = connection.pre(x)
  after, _ = connection.pre(connection.post(0 * h, context))
  np.testing.assert_allclose(after, h, atol=1e-6)


def test_the_scale_of_the_expansion_is_one_constant():
  x = random(2, 3, DIM)
  wide = streams.expand(x, 4, scale='random')
  factors = np.asarray(wide / x[:, :, None])
  np.testing.assert_allclose(
    factors, factors[:1, :1].repeat(2, 0).repeat(3, 1), rtol=1e-5
  )
  many = np.asarray(streams.expand(jnp.ones((1, 512)), 4, scale='random'))
  assert abs(many.mean() - 1) < 0.01
  assert abs(many.std() - 0.1) < 0.01
  # A run that goes on must find the same constants.
  first = 1.1622642, 1.2025265, 0.9566406
  np.testing.assert_allclose(many[0, 0, :3], first, rtol=1e-5)
  half = streams.expand(jnp.ones((1, 512), jnp.bfloat16), 4, scale='random')
  np.testing.assert_array_equal(half, many.astype(jnp.bfloat16))
  with pytest.raises((ValueError, TypeError), match='rand'):
    streams.expand(x, 4, scale='rand')


def test_kernels_have_the_same_parts_and_expansion(monkeypatch):
  """They defer writing: a random expansion has an empty pending output."""
  monkeypatch.setattr(launch, 'TOKENS', (16,))
  dim, results = 128, []
  x = random(16, dim)
  for implementation in ('xla', 'pallas'):
    settings = config.ConnectionConfig(
      num_streams=2,
      pre='static',
      post='off',
      res='off',
      expand_scale='random',
      implementation=implementation,
    )
    state = residual.expand_streams(settings, x)
    defers = implementation == 'pallas'
    assert isinstance(state, residual.PendingOutput) == defers
    sublayers = perturbed(initial(settings, dim, depth=1))
    results.append(output(settings, sublayers, x))
  np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def test_words_are_checked_where_there_are_no_settings():
  with pytest.raises((ValueError, TypeError), match='statik'):
    functional.Options(pre='statik')
  with pytest.raises((ValueError, TypeError), match='statik'):
    connections.HC(DIM, 2, 0, post='statik')
  with pytest.raises(
    ValueError, match=r"res='off' would not be used.*identity"
  ):
    connections.MHC(DIM, 2, 0, mixing='identity', res='off')
