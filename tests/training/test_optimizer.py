"""The learning rate over a run, decay, clipping."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import transformer
from mhc.training import optimizer


def rates(num_steps=100, **options):
  settings = config.OptimizerConfig(learning_rate=1.0, **options)
  rate = optimizer.learning_rate(settings, num_steps)
  counts = jnp.arange(num_steps)
  with jax.numpy_dtype_promotion('standard'):
    return np.asarray(jax.vmap(rate)(counts))


def test_the_papers_step_schedule():
  got = rates(warmup_steps=9)
  np.testing.assert_allclose(got[:9], np.arange(1, 10) / 10, rtol=1e-6)
  np.testing.assert_allclose(got[9:80], 1)
  np.testing.assert_allclose(got[80:90], 0.316, rtol=1e-6)
  np.testing.assert_allclose(got[90:], 0.1, rtol=1e-6)


def test_cosine_and_constant():
  cosine = rates(schedule='cosine', warmup_steps=0)
  np.testing.assert_allclose(cosine[50], 0.5, rtol=1e-5)
  assert cosine[-1] < 0.01
  np.testing.assert_allclose(rates(schedule='constant', warmup_steps=0), 1)


def test_what_decays():
  params = {}
  for kind in ('hc', 'mhc'):
    settings = config.ModelConfig(
      num_blocks=1,
      connection=config.ConnectionConfig(kind=kind, collapse='learned'),
    )
    model = nnx.eval_shape(
      lambda settings=settings: transformer.Transformer(
        settings, rngs=nnx.Rngs(0)
      )
    )
    params[kind] = nnx.to_pure_dict(nnx.state(model))
  mask = optimizer.decayed(params)
  decayed = {
    path[-1].key
    for path, flag in jax.tree_util.tree_leaves_with_path(mask)
    if flag
  }
  assert decayed == {
    'weight',
    'table',
    'phi',
    'theta_pre',
    'theta_post',
    'theta_res',
  }
  kept = {
    path[-1].key
    for path, flag in jax.tree_util.tree_leaves_with_path(mask)
    if not flag
  }
  assert kept == {
    'gain',
    'alpha',
    'bias',
    'bias_pre',
    'bias_post',
    'bias_res',
  }


def test_muon_orthogonalises_each_matrix_of_a_stack(optax_promotion):
  """Singular values of an update are equal; its RMS is 0.2 times the rate."""
  settings = config.OptimizerConfig(
    name='muon', learning_rate=1e-2, warmup_steps=0, weight_decay=0.0
  )
  transform = optimizer.make(settings, 100)
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'dense_blocks': {
      'ffn': {'up': {'weight': jnp.zeros((3, 16, 24))}},
      'ffn_connection': {
        'phi': jnp.zeros((2, 32, 8)),
        'bias': jnp.zeros((3, 24)),
      },
    },
    'head': {'weight': jnp.zeros((16, 24))},
  }
  grads = jax.tree.map(
    lambda p: jax.random.normal(keys[p.ndim - 1], p.shape) + 4 - p.ndim, params
  )

  @jax.jit
  def update(grads, params):
    return transform.update(grads, transform.init(params), params)[0]

  updates = update(grads, params)
  blocks = updates['dense_blocks']
  connection = blocks['ffn_connection']
  for stack in (blocks['ffn']['up']['weight'], connection['phi']):
    for matrix in np.asarray(stack):
      values = np.linalg.svd(matrix, compute_uv=False)
      assert values.max() / values.min() < 2  # Newton-Schulz is approximate
      rms = np.sqrt((matrix**2).mean())
      assert 0.5 < rms / (0.2 * 1e-2) < 1.5
  adam = np.asarray(updates['head']['weight'])
  np.testing.assert_allclose(np.abs(adam), 1e-2, rtol=1e-3)
  np.testing.assert_allclose(np.abs(connection['bias']), 1e-2, rtol=1e-3)


@pytest.mark.parametrize(
  ('kind', 'steps', 'rms', 'error'),
  [
    ('moonlight', [(3.4445, -4.7750, 2.0315)] * 5, 0.2, 0.8),
    (
      'deepseek_v4',
      [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2,
      0.18,
      1e-3,
    ),
  ],
)
@pytest.mark.parametrize('shape', [(24, 24), (12, 24), (24, 12)])
def test_each_muon_is_its_papers(kind, steps, rms, error, shape):
  """At condition 1e3, against the polynomials on singular values."""
  generator = np.random.default_rng(0)
  u, v = (np.linalg.qr(generator.normal(size=(n, n)))[0] for n in shape)
  values = np.geomspace(1, 1e-3, min(shape))
  u, v = u[:, : len(values)], v[:, : len(values)]
  settings = config.OptimizerConfig(
    name='muon',
    muon=kind,
    learning_rate=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=0.0,
  )
  with jax.enable_x64(), jax.numpy_dtype_promotion('standard'):
    transform = optimizer.make(settings, 100)
    matrix = jnp.asarray(u * values @ v.T)[None]
    grads = {'dense_blocks': {'ffn': {'up': {'weight': matrix}}}}
    update, _ = transform.update(grads, transform.init(grads), grads)
  update = -np.asarray(jax.tree.leaves(update)[0][0])
  want = values / np.linalg.norm(values)
  for a, b, c in steps:
    want = a * want + b * want**3 + c * want**5
  scale = rms * max(shape) ** 0.5
  np.testing.assert_allclose(u * want @ v.T * scale, update, atol=1e-7)
  np.testing.assert_allclose(want, 1, atol=error)
  if kind == 'deepseek_v4':
    np.testing.assert_allclose((update**2).mean() ** 0.5, rms, rtol=1e-3)


def test_what_muon_updates():
  settings = config.ModelConfig(
    num_blocks=2, moe=config.MoEConfig(num_experts=4)
  )
  model = nnx.eval_shape(
    lambda: transformer.Transformer(settings, rngs=nnx.Rngs(0))
  )
  chosen = {
    '/'.join(key.key for key in path[1:])
    for path, label in jax.tree_util.tree_leaves_with_path(
      optimizer.labels(nnx.to_pure_dict(nnx.state(model)))
    )
    if label == 'muon'
  }
  assert 'ffn/gate' in chosen
  assert 'ffn/router/weight' in chosen
  assert 'ffn_connection/phi' in chosen
  assert 'attention/query/weight' in chosen
  for name in chosen:
    assert name.rsplit('/')[-1] in ('weight', 'phi', 'gate', 'up', 'down')
  assert not {'table', 'weight', 'gain'} & chosen


def test_updates_of_gradients_whose_squares_underflow(optax_promotion):
  """Within the rate; Adam's of float64 where float32 holds the squares."""
  sizes = 10.0 ** np.arange(-21, 1, 0.5)
  settings = config.OptimizerConfig(
    learning_rate=1.0,
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=0.0,
    schedule='constant',
  )
  transform = optimizer.make(settings, 100)
  params = {'norm': {'gain': jnp.zeros(len(sizes))}}
  update = jax.jit(transform.update)
  state = transform.init(params)
  m, v = 0.0, 0.0
  for step in range(1, 30):
    g = sizes * np.cos(step)
    updates, state = update(
      {'norm': {'gain': jnp.asarray(g, jnp.float32)}}, state, params
    )
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
    exact = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-20)
    got = -np.asarray(updates['norm']['gain'])
    assert np.abs(got).max() < 1.5
    large = sizes > 1e-14
    np.testing.assert_allclose(got[large], exact[large], rtol=1e-4, atol=1e-5)


def test_clipping_bounds_the_update_and_can_be_off(optax_promotion):
  """Adam's first moment is linear in the clipped gradient."""
  params = {'norm': {'gain': jnp.zeros(4)}}
  grads = {'norm': {'gain': jnp.full(4, 50.0)}}
  moments = {}
  for clip_norm in (0.0, 1.0):
    settings = config.OptimizerConfig(clip_norm=clip_norm)
    transform = optimizer.make(settings, 100)
    _, state = transform.update(grads, transform.init(params), params)
    leaves = [
      leaf
      for leaf in jax.tree.leaves(state)
      if leaf.shape == (4,) and leaf.dtype == jnp.float32
    ]
    moments[clip_norm] = float(jnp.linalg.norm(leaves[0]))
  np.testing.assert_allclose(moments[1.0], 0.1, rtol=1e-5)
  np.testing.assert_allclose(moments[0.0], 0.1 * 100, rtol=1e-5)
