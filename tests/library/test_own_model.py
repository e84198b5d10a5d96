"""What an engineer does with a Flax model of her own."""

import contextlib
import functools
import os
import subprocess
import sys

from flax import linen
from flax import nnx
from flax.nnx import bridge
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import mhc

N, DIM, DEPTH = 4, 8, 2
# Few iterations of Sinkhorn, for the sake of the compiler.
MHC = functools.partial(mhc.MHC, sinkhorn_iters=3)
modules = getattr(nnx, 'List', list)  # the oldest Flax takes lists as they are


class Plain(nnx.Module):
  """x + F(norm(x)), twice, and a head."""

  def __init__(self, rngs, post_norm=False):
    self.norms = modules([nnx.RMSNorm(DIM, rngs=rngs) for _ in range(DEPTH)])
    self.mlps = modules([nnx.Linear(DIM, DIM, rngs=rngs) for _ in range(DEPTH)])
    self.last = nnx.RMSNorm(DIM, rngs=rngs)
    self.post_norm = post_norm

  def __call__(self, x):
    for norm, mlp in zip(self.norms, self.mlps, strict=True):
      x = x + (norm(mlp(x)) if self.post_norm else mlp(norm(x)))
    return self.last(x)


class Wide(Plain):
  """The same with connections around the sub-layers."""

  def __init__(self, rngs, post_norm=False, collapse='mean', make=MHC):
    super().__init__(rngs, post_norm)
    self.connections = modules([make(DIM, N, i) for i in range(DEPTH)])
    self.collapse = mhc.Collapse(collapse, DIM, N)

  def streams(self, x):
    x = mhc.expand(x, N)
    parts = zip(self.norms, self.mlps, self.connections, strict=True)
    for norm, mlp, connection in parts:
      h, context = connection.pre(x)
      y = norm(mlp(h)) if self.post_norm else mlp(norm(h))
      x = connection.post(y, context)
    return self.collapse(x)

  def __call__(self, x):
    return self.last(self.streams(x))


class NoLastNorm(Wide):
  def __call__(self, x):
    return self.streams(x)


class PlainNoLastNorm(Plain):
  def __call__(self, x):
    for norm, mlp in zip(self.norms, self.mlps, strict=True):
      x = x + mlp(norm(x))
    return x


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch(seed=0, scale=1.0):
  return jnp.asarray(scale * normal(seed, (2, 5, DIM)))


def perturb(model, seed=0):
  """Moves every parameter, in place."""
  params = nnx.state(model, nnx.Param)
  leaves, tree = jax.tree.flatten(params)
  moved = [
    jnp.asarray(np.asarray(leaf) + 0.3 * normal(seed + number, leaf.shape))
    for number, leaf in enumerate(leaves)
  ]
  nnx.update(model, jax.tree.unflatten(tree, moved))
  return model


# wrap


def test_wrap_is_pre_norm_sublayer_post():
  rngs = nnx.Rngs(0)
  mlp, norm = nnx.Linear(DIM, DIM, rngs=rngs), nnx.RMSNorm(DIM, rngs=rngs)
  block = perturb(mhc.wrap(mlp, mhc.MHC(DIM, N, 0), norm=norm))
  x = mhc.expand(batch(), N)
  h, context = block.connection.pre(x)
  want = block.connection.post(mlp(norm(h)), context)
  np.testing.assert_array_equal(block(x), want)
  assert len(jax.tree.leaves(nnx.state(block, nnx.Param))) == 6


def test_wrap_passes_arguments_and_further_results():
  def attention(h, mask, *, scale):
    return h * mask[..., None] * scale, {'cache': h}

  block = mhc.wrap(attention, mhc.HC(DIM, N, 0), norm=None)
  x = mhc.expand(batch(), N)
  out, rest = block(x, jnp.ones((2, 5)), scale=2.0)
  assert out.shape == x.shape
  assert rest['cache'].shape == (2, 5, DIM)


def test_wrap_refuses_what_is_no_connection_or_no_function():
  with pytest.raises(TypeError, match='pre and post'):
    mhc.wrap(jnp.sin, nnx.RMSNorm(DIM, rngs=nnx.Rngs(0)), norm=None)
  with pytest.raises(TypeError, match='sublayer'):
    mhc.wrap(3, mhc.MHC(DIM, N, 0), norm=None)


def test_nnx_tabulate_shows_a_wrapped_block():
  block = mhc.wrap(jnp.sin, mhc.MHC(DIM, N, 0), norm=None)
  assert 'MHC' in nnx.tabulate(block, jnp.ones((2, N, DIM)))


# upcycle


@pytest.mark.parametrize('make', [MHC, mhc.HC], ids=['MHC', 'HC'])
def test_upcycling_gives_the_function_of_the_plain_model(make):
  plain = perturb(Plain(nnx.Rngs(0)))
  wide = Wide(nnx.Rngs(1), make=make)
  difference = mhc.upcycle(plain, wide, batch())
  assert 0 <= difference < 1e-5
  np.testing.assert_allclose(wide(batch(1)), plain(batch(1)), atol=1e-4)
  wide.mlps[0].kernel[...] += 1  # a copy: the plain model stays
  assert not np.allclose(wide.mlps[0].kernel[...], plain.mlps[0].kernel[...])


def test_upcycling_renames():
  class Wrapped(nnx.Module):
    def __init__(self, rngs):
      self.blocks = modules(
        [
          mhc.wrap(
            nnx.Linear(DIM, DIM, rngs=rngs),
            MHC(DIM, N, i),
            norm=nnx.RMSNorm(DIM, rngs=rngs),
          )
          for i in range(DEPTH)
        ]
      )
      self.last = nnx.RMSNorm(DIM, rngs=rngs)

    def __call__(self, x):
      x = mhc.expand(x, N)
      for block in self.blocks:
        x = block(x)
      return self.last(mhc.Collapse('sum', DIM, N)(x))

  def rename(name):
    if not name.startswith(('mlps', 'norms')):
      return name
    part, number, rest = name.split('.')
    part = {'mlps': 'sublayer', 'norms': 'norm'}[part]
    return f'blocks.{number}.{part}.{rest}'

  plain, wide = perturb(Plain(nnx.Rngs(0))), Wrapped(nnx.Rngs(1))
  with pytest.raises(ValueError, match=r'no mlps\.0\.bias.*rename'):
    mhc.upcycle(plain, wide, batch())
  assert mhc.upcycle(plain, wide, batch(), rename=rename) < 1e-5


def compiled(model):
  """The model, called as one program."""
  kind = type(model)
  model.__class__ = type(
    kind.__name__, (kind,), {'__call__': nnx.jit(kind.__call__)}
  )
  return model


def test_upcycling_says_what_makes_the_models_differ():
  for plain, wide, scale, word in (
    (
      perturb(Plain(nnx.Rngs(0), True)),
      Wide(nnx.Rngs(1), True),
      1.0,
      'post-norm',
    ),
    (Plain(nnx.Rngs(0)), Wide(nnx.Rngs(1)), 1e-3, 'eps'),
    (
      PlainNoLastNorm(nnx.Rngs(0)),
      NoLastNorm(nnx.Rngs(1), collapse='sum'),
      1.0,
      r'4 times as large.*mean',
    ),
  ):
    with pytest.raises(ValueError, match=word):
      mhc.upcycle(compiled(plain), compiled(wide), batch(scale=scale))


def test_upcycling_refuses_other_sizes_and_left_over_parts():
  class More(Wide):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.extra = nnx.Linear(DIM, DIM, rngs=rngs)

  with pytest.raises(ValueError, match=r'plain model has no extra\.bias'):
    mhc.upcycle(Plain(nnx.Rngs(0)), More(nnx.Rngs(1)))
  plain = Plain(nnx.Rngs(0))
  plain.last = nnx.RMSNorm(2 * DIM, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'last\.scale has the shape \(16,\)'):
    mhc.upcycle(plain, Wide(nnx.Rngs(1)))


# observe


def test_observe_measures_what_the_connections_do():
  model = perturb(Wide(nnx.Rngs(0)))
  seen = mhc.observe(model, batch())
  assert seen.stats.res.shape == (DEPTH, 10, N, N)

  @jax.jit
  def want(x):
    res, x = [], mhc.expand(x, N)
    for norm, mlp, connection in zip(
      model.norms, model.mlps, model.connections, strict=True
    ):
      h, context = connection.pre(x)
      res.append(jnp.moveaxis(context.mappings.res, -1, 0))
      x = connection.post(mlp(norm(h)), context)
    return mhc.gains.profile(jnp.stack(res))

  for name, value in want(batch()).items():
    np.testing.assert_allclose(
      seen.profile[name], value, rtol=1e-4, atol=1e-5, err_msg=name
    )
  assert seen.cosine[0] == pytest.approx(1, abs=1e-5)
  assert np.all(seen.streams_read <= N + 1e-4)
  assert len(str(seen).splitlines()) == 1 + DEPTH
  # At the start: what the paper's initial values keep of a difference.
  fresh = mhc.observe(jax.jit(Wide(nnx.Rngs(0)).__call__), batch())
  np.testing.assert_allclose(
    fresh.profile['sigma_diff_fwd'],
    0.99016 ** np.arange(1, DEPTH + 1),
    atol=1e-5,
  )


def stacked():
  make = jax.vmap(lambda i: nnx.state(MHC(DIM, N, i)))
  graphdef = nnx.graphdef(MHC(DIM, N, 0))
  return graphdef, make(jnp.arange(DEPTH))


def sublayer(graphdef, state, x):
  connection = nnx.merge(graphdef, state)
  h, context = connection.pre(x)
  return connection.post(jnp.sin(h), context)


def in_a_loop(x, remat=False):
  graphdef, states = stacked()
  step = lambda x, state: (sublayer(graphdef, state, x), None)
  if remat:
    step = jax.checkpoint(step)
  return jax.lax.scan(step, x, states)[0]


def test_observe_sees_through_jit_scan_remat_and_vmap():
  x = mhc.expand(batch(), N)
  want = mhc.observe(in_a_loop, x)
  jitted = jax.jit(in_a_loop)
  jitted(x)  # compiled without an observer, and to be traced again
  models = {
    'jit': jitted,
    'remat': lambda x: jax.jit(in_a_loop, static_argnums=1)(x, True),
  }
  if jax.__version_info__ >= (0, 11):
    models['vmap'] = jax.vmap(in_a_loop)
    models['two vmaps'] = jax.jit(jax.vmap(jax.vmap(in_a_loop)))
  for name, model in models.items():
    seen = mhc.observe(model, x)
    for got, wanted in zip(seen.stats, want.stats, strict=True):
      np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=name)
  assert len(jax.make_jaxpr(jitted)(x).effects) == 0  # nothing stays


def test_observe_takes_every_kind_and_plain_functions():
  x = batch()
  identity = functools.partial(mhc.MHC, mixing='identity')
  for make in (mhc.HC, identity):
    seen = mhc.observe(jax.jit(Wide(nnx.Rngs(0), make=make).__call__), x)
    assert seen.stats.pre.shape == (DEPTH, 10, N)
  params = mhc.functional.init(DIM, N, 0)

  @jax.jit
  def bare(x):
    h, context = mhc.functional.pre(params, x)
    return mhc.functional.post(h, context)

  assert mhc.observe(bare, mhc.expand(x, N)).rms.shape == (1,)
  residual = mhc.Residual()
  pre = jax.jit(lambda x: residual.pre(x)[0])
  seen = mhc.observe(pre, x[..., None, :])
  assert seen.stats.res.shape == (1, 10, 1, 1)
  with pytest.raises(ValueError, match='no connection'):
    mhc.observe(jnp.sin, x)


def test_observe_refuses_stacks_of_several_sizes():
  @jax.jit
  def two(x):
    MHC(DIM, N, 0).pre(mhc.expand(x, N))
    MHC(DIM, 2, 0).pre(mhc.expand(x, 2))

  with pytest.raises(ValueError, match='several numbers'):
    mhc.observe(two, batch())
  one = jax.jit(lambda x: MHC(DIM, N, 0).pre(mhc.expand(x, N))[0])
  seen = mhc.observe(one, batch(), max_tokens=3)
  assert seen.stats.res.shape == (1, 3, N, N)


# optimisers


def test_the_mask_decides_about_connections_and_leaves_the_rest():
  model = Wide(nnx.Rngs(0), collapse='learned')
  state = nnx.state(model, nnx.Param)
  pure = nnx.to_pure_dict(state)
  for params in (model, state, pure):
    mask = {
      mhc.optimizer.path_names(path): value
      for path, value in jax.tree_util.tree_leaves_with_path(
        mhc.optimizer.decayed(params)
      )
    }
    for i in range(DEPTH):
      assert mask['connections', str(i), 'phi'] is True
      assert mask['connections', str(i), 'alpha'] is False
      assert mask['connections', str(i), 'bias'] is False
      assert mask['norms', str(i), 'scale'] is False
      assert mask['mlps', str(i), 'kernel'] is True
      assert mask['mlps', str(i), 'bias'] is False
    assert mask['collapse', 'phi'] is True
    assert mask['collapse', 'bias'] is False
  names = []
  mask = mhc.optimizer.decayed(
    pure, rest=lambda name, leaf: names.append(name) or name[0] == 'norms'
  )
  assert mask['norms'][0]['scale'] is True
  assert mask['mlps'][0]['kernel'] is False
  assert mask['connections'][0]['phi'] is True
  assert not [name for name in names if name[0] == 'connections']


def test_a_bias_beside_other_names_is_no_connections():
  params = {
    'attention': {'alpha': jnp.ones((2, 2)), 'bias': jnp.ones((2, 2))},
    'hc': nnx.to_pure_dict(nnx.state(mhc.HC(DIM, N, 0))),
  }
  mask = mhc.optimizer.decayed(params)
  assert mask['attention'] == {'alpha': True, 'bias': True}
  assert {name for name, decays in mask['hc'].items() if decays} == {
    *('theta_pre', 'theta_post', 'theta_res')
  }


def test_nnx_optimizer_decays_by_the_mask():
  model = perturb(Wide(nnx.Rngs(0)))
  before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tx = optax.adamw(1e-3, weight_decay=0.5, mask=mhc.optimizer.decayed)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
  with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
    optimizer.update(model, zeros)
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  change = lambda *names: np.abs(_get(after, names) - _get(before, names)).max()
  assert change('connections', 0, 'bias') == 0
  assert change('connections', 0, 'alpha') == 0
  assert change('norms', 0, 'scale') == 0
  assert change('connections', 0, 'phi') > 0
  assert change('mlps', 0, 'kernel') > 0


def _get(tree, names):
  for name in names:
    tree = tree[name]
  return tree


# Other worlds


def test_linen_by_the_bridge():
  class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
      connection = bridge.to_linen(mhc.MHC, DIM, N, 0, name='connection')
      h, context = connection(x, nnx_method=mhc.MHC.pre)
      y = linen.Dense(DIM)(linen.RMSNorm()(h))
      return connection(y, context, nnx_method=mhc.MHC.post)

  x = mhc.expand(batch(), N)
  variables = Block().init(jax.random.key(0), x)
  out = Block().apply(variables, x)
  assert out.shape == x.shape
  assert {'phi', 'alpha', 'bias'} == {*variables['params']['connection']}
  mask = mhc.optimizer.decayed(variables['params'])
  assert not jax.tree.leaves(mask['connection']['bias'])[0]


def test_orbax_saves_and_restores_a_users_model(tmp_path):
  model = perturb(Wide(nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
    checkpointer.save(tmp_path / 'model', state)
    checkpointer.wait_until_finished()
    abstract = nnx.eval_shape(lambda: nnx.state(Wide(nnx.Rngs(1))))
    restored = checkpointer.restore(tmp_path / 'model', abstract)
  again = nnx.merge(graphdef, restored)
  np.testing.assert_array_equal(again(batch()), model(batch()))


LATER = """
import sys, mhc
assert 'mhc.interop' not in sys.modules
sys.modules['safetensors'] = None  # as where the library alone is installed
try:
  mhc.interop
except ImportError as error:
  assert "needs safetensors: pip install 'mhc-jax[train]'" in str(error), error
else:
  sys.exit('it needs nothing')
del sys.modules['safetensors']
mhc.optimizer.decayed, mhc.gains.amax_gain, mhc.interop.load
"""


def test_modules_that_need_more_are_loaded_when_asked_for():
  """And one that lacks what it needs says what."""
  pytest.importorskip('safetensors', reason='the library alone lacks it')
  subprocess.run([sys.executable, '-c', LATER], check=True)


X64 = """
import json, jax, jax.numpy as jnp, mhc
from flax import nnx
assert jax.config.jax_enable_x64
found = {}
for name, make in {
  'mhc': lambda: mhc.MHC(8, 4, 0), 'hc': lambda: mhc.HC(8, 4, 0),
  'cayley': lambda: mhc.MHC(8, 4, 0, mixing='cayley'),
  'kronecker': lambda: mhc.MHC(8, 4, 0, mixing='kronecker'),
  'identity': lambda: mhc.MHC(8, 4, 0, mixing='identity'),
  'permutations': lambda: mhc.MHC(8, 4, 0, mixing='permutations'),
}.items():
  parts = jax.eval_shape(
    lambda: (make(), make(), mhc.Collapse('learned', 8, 4))
  )
  for dtype in ('float32', 'float64', 'bfloat16'):
    x = jax.ShapeDtypeStruct((3, 4, 8), dtype)
    def loss(parts, x):
      h, context = parts[0].pre(x)
      mappings = context.mappings
      h, context = parts[1].advance(jnp.sin(h), context)
      out = parts[2](parts[1].post(h, context))
      assert out.dtype == x.dtype
      return jnp.sum(out.astype(float)), mappings
    grads, mappings = jax.eval_shape(jax.grad(loss, has_aux=True), parts, x)
    leaves = jax.tree.leaves((parts, grads, mappings))
    found[name, dtype] = sorted({str(leaf.dtype) for leaf in leaves})
    assert found[name, dtype] == ['float32'], (name, dtype, found)
print(jax.eval_shape(mhc.sinkhorn_project, jnp.ones((4, 4))).dtype)
profile = jax.eval_shape(mhc.gains.profile, jnp.ones((2, 3, 4, 4), 'float32'))
print(profile['gain_bwd'].dtype)
"""


def test_parameters_and_mappings_stay_float32_under_x64():
  result = subprocess.run(
    [sys.executable, '-c', X64],
    env=os.environ | {'JAX_ENABLE_X64': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-2000:]
  assert result.stdout.split() == ['float32', 'float32']
