"""Parameters under other code's names are the same function, bit for bit.

The references are numpy: DeepSeek's formulas, and a model that knows only
docs/interop.md. They take complex numbers, so that derivatives come from
f'(x) = Im f(x + ih) / h, exact in float64 and independent of any backward pass.
"""

import dataclasses
import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy
import saved_runs

from mhc import config
from mhc import connections
from mhc import interop
from mhc import streams
from mhc.config import dicts
from mhc.data import tokenizer
from mhc.interop import names as names_lib
from mhc.model import parameters
from mhc.model import transformer
from mhc.training import export as export_lib
from mhc.training import workdir as workdir_lib

EPS, DIM, TOKENS = 1e-6, 6, 3
DENSE = config.ModelConfig(
  vocab_size=258,
  num_blocks=3,
  dim=8,
  ffn_dim=12,
  attention=config.AttentionConfig(
    num_heads=2, head_dim=4, rope_dim=2, kv_rank=5
  ),
  connection=config.ConnectionConfig(
    num_streams=3, collapse='learned', sinkhorn_eps=EPS
  ),
)
EXPERTS = dataclasses.replace(
  DENSE,
  attention=dataclasses.replace(DENSE.attention, query_rank=6),
  moe=config.MoEConfig(num_experts=4, experts_per_token=2, expert_dim=5),
)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  x = np.exp(x - np.max(x.real, axis=-1, keepdims=True))
  return x / np.sum(x, axis=-1, keepdims=True)


def normed(x, eps=1e-20):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def coefficients(x, fn, base, scale):
  """pre, post, comb of streams [..., t, n, d]."""
  n = x.shape[-2]
  product = x.reshape(*x.shape[:-2], -1) @ np.swapaxes(fn, -1, -2)
  square = np.mean((x * x).reshape(*x.shape[:-2], -1), axis=-1, keepdims=True)
  mixes = product / np.sqrt(square + 1e-20)
  sizes = np.repeat(scale, [n, n, n * n], axis=-1)
  mixes = mixes * sizes[..., None, :] + base[..., None, :]
  pre = sigmoid(mixes[..., :n]) + EPS
  post = 2 * sigmoid(mixes[..., n : 2 * n])
  comb = softmax(mixes[..., 2 * n :].reshape(*mixes.shape[:-1], n, n)) + EPS
  comb = comb / (np.sum(comb, axis=-2, keepdims=True) + EPS)
  for _ in range(19):
    comb = comb / (np.sum(comb, axis=-1, keepdims=True) + EPS)
    comb = comb / (np.sum(comb, axis=-2, keepdims=True) + EPS)
  return pre, post, comb


def deepseek_layer(x, f, fn, base, scale):
  """What a sub-layer reads and, its output being f, what it leaves."""
  pre, post, comb = coefficients(x, fn, base, scale)
  h = np.sum(pre[..., None] * x, axis=-2)
  mixed = np.sum(comb[..., None] * x[..., :, None, :], axis=-3)
  return h, post[..., None] * f[..., None, :] + mixed


def tencent_layer(x, f, fn, base, scale):
  """The same of Hy4, which does not mix the streams."""
  n = x.shape[-2]
  mixes = normed(x.reshape(*x.shape[:-2], -1)) @ fn.T
  pre = sigmoid(mixes[..., :n] * scale[0] + base[:n]) + EPS
  post = 2 * sigmoid(mixes[..., n:] * scale[1] + base[n:]) + EPS
  h = np.sum(pre[..., None] * x, axis=-2)
  return h, x + post[..., None] * f[..., None, :]


def deepseek_head(x, fn, base, scale):
  mixes = normed(x.reshape(*x.shape[:-2], -1)) @ np.swapaxes(fn, -1, -2)
  weights = sigmoid(mixes * scale[..., None, :] + base[..., None, :]) + EPS
  return np.sum(weights[..., None] * x, axis=-2)


def gradients(function, arguments):
  """Of a real function, by an imaginary step in every entry."""
  wide = {name: a.astype(np.float64) for name, a in arguments.items()}
  result = {}
  for name, a in wide.items():
    steps = 1e-30j * np.eye(a.size).reshape(a.size, *a.shape)
    moved = {
      other: a + steps if other == name else b[None]
      for other, b in wide.items()
    }
    result[name] = (function(**moved).imag / 1e-30).reshape(a.shape)
  return result


def triple(n, seed, k=None, scales=3, dim=DIM):
  """Tensors of which logits have a standard deviation of about 1.5."""
  rng = np.random.default_rng(seed)
  k = 2 * n + n * n if k is None else k
  tensors = {
    'fn': rng.normal(size=(k, n * dim)) / np.sqrt(n * dim),
    'base': rng.normal(size=k),
    'scale': rng.uniform(0.7, 1.5, scales),
  }
  return {name: t.astype(np.float32) for name, t in tensors.items()}


def normals(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def filled(module, params):
  for name, value in params.items():
    setattr(module, name, nnx.Param(jnp.asarray(value)))
  return module


def layer(n, params):
  return filled(connections.MHC(DIM, n, 0, sinkhorn_eps=EPS), params)


def close(got, want, atol=1e-5):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)


@pytest.mark.parametrize('n', [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_layer_is_deepseeks(n):
  """Forward, and every gradient."""
  tensors = triple(n, 0)
  x, f, g_h, g_y = normals(
    1, (TOKENS, n, DIM), (TOKENS, DIM), (TOKENS, DIM), (TOKENS, n, DIM)
  )

  def ours(params, x, f):
    connection = layer(n, params)
    h, context = connection.pre(x)
    return h, connection.post(f, context)

  def scalar(params, x, f):
    h, y = ours(params, x, f)
    return jnp.sum(h * g_h) + jnp.sum(y * g_y)

  def reference(**arguments):
    h, y = deepseek_layer(**arguments)
    axes = (-3, -2, -1)
    return np.sum(h * g_h, axis=axes[1:]) + np.sum(y * g_y, axis=axes)

  params = interop.connection_from_deepseek(tensors, n)
  wide = {name: t.astype(np.float64) for name, t in tensors.items()}
  for got, want in zip(
    jax.jit(ours)(params, x, f), deepseek_layer(x, f, **wide), strict=True
  ):
    close(got, want)
  grads = jax.jit(jax.grad(scalar, (0, 1, 2)))(params, x, f)
  got = interop.connection_to_deepseek(grads[0], n)
  want = gradients(reference, {'x': x, 'f': f, **tensors})
  assert all(np.abs(w).max() > 0.1 for w in want.values())
  for name, value in (got | {'x': grads[1], 'f': grads[2]}).items():
    # Sums over tokens and streams: relative to the largest.
    close(value, want[name], atol=1e-5 * np.abs(want[name]).max())


@pytest.mark.parametrize('n', [3, pytest.param(4, marks=pytest.mark.slow)])
def test_without_the_transposition_it_is_another_layer(n):
  """From 3 streams on: 2 x 2 matrices of equal margins are symmetric."""
  tensors = triple(n, 0)
  x, f = normals(1, (TOKENS, n, DIM), (TOKENS, DIM))
  want = deepseek_layer(x, f, **tensors)[1]
  wrong = {
    'phi': tensors['fn'].T,
    'alpha': tensors['scale'],
    'bias': tensors['base'],
  }
  right = interop.connection_from_deepseek(tensors, n)
  assert {name: a.shape for name, a in right.items()} == {
    name: a.shape for name, a in wrong.items()
  }
  errors = []
  for params in (right, wrong):
    connection = layer(n, params)
    context = connection.pre(jnp.asarray(x))[1]
    got = connection.post(jnp.asarray(f), context)
    errors.append(np.abs(got - want).max())
  assert errors[0] < 1e-5
  assert errors[1] > 0.1


@pytest.mark.parametrize('n', [1, 4])
def test_an_identity_layer_is_tencents(n):
  """Its tensors being arrays of JAX, of 16 bits."""
  tensors = triple(n, 0, k=2 * n, scales=2)
  x, f = normals(1, (TOKENS, n, DIM), (TOKENS, DIM))
  halves = {name: jnp.asarray(t, jnp.bfloat16) for name, t in tensors.items()}
  tensors = {name: np.asarray(t, np.float32) for name, t in halves.items()}
  params = interop.connection_from_deepseek(halves, n)
  same(interop.connection_to_deepseek(params, n), tensors)
  connection = filled(connections.MHC(DIM, n, 0, mixing='identity'), params)
  h, context = connection.pre(jnp.asarray(x))
  got = h, connection.post(jnp.asarray(f), context)
  wide = {name: t.astype(np.float64) for name, t in tensors.items()}
  for ours, theirs in zip(got, tencent_layer(x, f, **wide), strict=True):
    close(ours, theirs)


def test_the_head_is_deepseeks():
  n = 4
  tensors = triple(n, 2, k=n, scales=1)
  x, g = normals(3, (TOKENS, n, DIM), (TOKENS, DIM))

  def ours(params, x):
    return filled(streams.Collapse('learned', DIM, n), params)(x)

  def reference(**arguments):
    return np.sum(deepseek_head(**arguments) * g, axis=(-2, -1))

  params = interop.connection_from_deepseek(tensors, n)
  close(ours(params, jnp.asarray(x)), deepseek_head(x, **tensors))
  grads = jax.grad(lambda p, x: jnp.sum(ours(p, x) * g), (0, 1))(
    params, jnp.asarray(x)
  )
  got = interop.connection_to_deepseek(grads[0], n) | {'x': grads[1]}
  want = gradients(reference, {'x': x, **tensors})
  for name, value in got.items():
    close(value, want[name])


def test_single_pass_layers_are_those_of_deepseek_v4_1():
  """pre is read by one sub-layer later; the last closes the streams."""
  n = 4
  tensors = [triple(n, seed) for seed in (4, 5)]
  x, *outputs = normals(6, (TOKENS, n, DIM), (TOKENS, DIM), (TOKENS, DIM))
  want, wide, pre = [], x, np.eye(n)[:1]
  for t, f in zip(tensors, outputs, strict=True):
    want.append(np.sum(pre[..., None] * wide, axis=-2))
    pre = coefficients(wide, **t)[0]
    wide = deepseek_layer(wide, f, **t)[1]
  want.append(np.sum(pre[..., None] * wide, axis=-2))

  weights = jnp.tile(jnp.eye(n)[:, :1], TOKENS)
  got, state = [], connections.StreamsWithPre(jnp.asarray(x), weights)
  for index, (t, f) in enumerate(zip(tensors, outputs, strict=True)):
    connection = connections.SinglePass(DIM, n, index, sinkhorn_eps=EPS)
    filled(connection.next_mhc, interop.connection_from_deepseek(t, n))
    h, context = connection.pre(state)
    got.append(h)
    state = connection.post(jnp.asarray(f), context)
  got.append(state.read())
  close(got, want)


@pytest.mark.parametrize('n', [1, 2, 4, 5])
def test_round_trips_of_a_layer_and_a_head_are_exact(n):
  for tensors in (triple(n, 7), triple(n, 8, k=n, scales=1)):
    params = interop.connection_from_deepseek(tensors, n)
    same(interop.connection_to_deepseek(params, n), tensors)
    again = interop.connection_from_deepseek(
      interop.connection_to_deepseek(params, n), n
    )
    same(again, params)


def same(got, want):
  got, want = (
    {parameters.path_names(p): leaf for p, leaf in leaves}
    for leaves in map(jax.tree_util.tree_leaves_with_path, (got, want))
  )
  assert set(got) == set(want)
  for name, value in want.items():
    assert got[name].dtype == value.dtype
    np.testing.assert_array_equal(got[name], value, str(name))


def with_kind(model, kind, **changes):
  return dicts.replace(model, connection={'kind': kind, **changes})


@pytest.mark.parametrize('names', ['deepseek', 'transformers', 'tencent'])
@pytest.mark.parametrize(
  'model',
  [
    DENSE,
    EXPERTS,
    with_kind(EXPERTS, 'mhc', collapse='mean'),
    with_kind(DENSE, 'mhc_single_pass', collapse='sum'),
    with_kind(EXPERTS, 'identity'),
  ],
  ids=['dense', 'experts', 'mean', 'single pass', 'identity'],
)
def test_a_models_connections_travel(model, names):
  _, state = saved_runs.random_state(model)
  if names == 'tencent' and model.connection.kind != 'identity':
    with pytest.raises(ValueError, match="'tencent' are of connection"):
      interop.to_deepseek(state.params, model, names)
    return
  _, other = saved_runs.random_state(model, seed=1)
  tensors = interop.to_deepseek(state.params, model, names)
  prefix = '' if names == 'deepseek' else 'model.'
  assert all(name.startswith(f'{prefix}layers') for name in tensors) == (
    model.connection.collapse != 'learned'
  )
  before = jax.tree.map(lambda leaf: leaf, other.params)
  got = interop.from_deepseek(tensors, other.params, model)
  same(other.params, before)
  want = jax.tree_util.tree_map_with_path(
    lambda path, ours, theirs: (
      ours
      if {'collapse', 'attention_connection', 'ffn_connection'}
      & set(parameters.path_names(path))
      else theirs
    ),
    state.params,
    other.params,
  )
  same(got, want)
  same(interop.to_deepseek(got, model, names), tensors)


def test_names_and_blocks():
  """Blocks count over both stacks; files also mix the two ways to name them."""
  _, state = saved_runs.random_state(EXPERTS)
  tensors = interop.to_deepseek(state.params, EXPERTS)
  assert len(tensors) == 3 * 2 * 3 + 3
  want = interop.connection_to_deepseek(
    jax.tree.map(
      lambda leaf: leaf[1], state.params['moe_blocks']['ffn_connection']
    ),
    3,
  )
  same({role: tensors[f'layers.2.hc_ffn_{role}'] for role in want}, want)
  names = interop.to_deepseek(state.params, EXPERTS, 'transformers')
  assert {'model.layers.0.attn_hc.scale', 'model.hc_head.hc_fn'} <= set(names)
  other = with_kind(EXPERTS, 'identity')
  _, own = saved_runs.random_state(other)
  names = interop.to_deepseek(own.params, other, 'tencent')
  assert {
    'model.layers.2.hc_attn_layer.hc_pre.hc_scale',
    'model.layers.0.hc_mlp_layer.hc_pre.hc_fn',
    'model.hc_head.hc_head_base',
  } <= set(names)
  mixed = {
    f'model.{name}' if name.startswith('layers.1') else name: tensor
    for name, tensor in tensors.items()
  }
  same(interop.from_deepseek(mixed, state.params, EXPERTS), state.params)


def test_other_tensors_are_refused():
  _, state = saved_runs.random_state(DENSE)
  tensors = interop.to_deepseek(state.params, DENSE)

  def refused(changes, *needles, model=DENSE):
    given = {k: v for k, v in (tensors | changes).items() if v is not None}
    with pytest.raises(ValueError, match=re.escape(needles[0])) as error:
      interop.from_deepseek(given, state.params, model)
    assert all(needle in str(error.value) for needle in needles)

  fn, name = tensors['layers.1.hc_attn_fn'], 'layers.1.hc_attn_fn'
  refused({name: None}, f'{name}, float32 [15, 24], is missing', '3 blocks')
  refused({name: fn.T}, f'{name} is float32 [24, 15], must be float32 [15, 24]')
  refused({name: fn.astype(np.float64)}, 'is float64 [15, 24], must be float32')
  refused({'layers.3.hc_attn_fn': fn}, 'layers.3.hc_attn_fn', '3 blocks')
  refused({'layers.0.attn.wkv.weight': fn}, 'wkv.weight', 'unknown tensor')
  refused({f'model.{name}': fn}, f'{name} is given twice')
  mean = with_kind(DENSE, 'mhc', collapse='mean')
  refused({}, 'hc_head_', 'unknown tensor', "collapse='mean'", model=mean)
  for kind in config.KINDS:
    if kind not in names_lib.KINDS:
      own = config.ConnectionConfig(kind, num_streams=2)
      other = dataclasses.replace(DENSE, connection=own)
      refused({}, f'kind={kind!r} must be one of', model=other)
      with pytest.raises(ValueError, match=f"kind='{kind}' must be one of"):
        interop.to_deepseek(state.params, other)


def test_other_layers_are_refused():
  tensors = triple(4, 0)
  for change, message in (
    ({'fn': tensors['fn'][:8]}, r'fn is float32 \[8, 24\], must be'),
    ({'scale': tensors['scale'][:2]}, r'fn is .* must be float32 \[8, 24\]'),
    ({'scale': tensors['scale'][:0]}, r'scale is .* must be float32 \[3\]'),
    ({'norm': tensors['base']}, 'norm, .* unknown tensor'),
  ):
    with pytest.raises(ValueError, match=message):
      interop.connection_from_deepseek(tensors | change, 4)
  with pytest.raises(ValueError, match=r'fn, float32 .* is missing'):
    interop.connection_from_deepseek({'base': tensors['base']}, 4)
  for mixing in ('permutations', 'kronecker', 'cayley'):
    module = connections.MHC(DIM, 4, 0, mixing=mixing)
    params = nnx.to_pure_dict(nnx.state(module))
    with pytest.raises(ValueError, match=r'fn is float32 .* must be'):
      interop.connection_to_deepseek(params, 4)


def test_static_and_constant_mappings_are_tensors():
  """What does not train is where it started: fn = 0, the constant's base."""
  (x,), (n, parts) = normals(6, (TOKENS, 4, DIM)), (4, ('off', 'static'))
  module = connections.MHC(
    DIM, n, 0, sinkhorn_eps=EPS, pre=parts[0], post=parts[1]
  )
  params = nnx.to_pure_dict(nnx.state(module))
  moved = jnp.where(jnp.arange(24) < n, 0, jnp.arange(24.0) / 24)
  module.bias[...] = params['bias'] = params['bias'] + moved
  pre, post, comb = coefficients(x, **interop.connection_to_deepseek(params, n))
  got = module.mappings(jnp.asarray(x))
  close([got.pre.T, got.post.T], [pre, post])
  close([jnp.moveaxis(got.res, -1, 0)], [comb.swapaxes(-1, -2)])


def test_what_tensors_cannot_say_is_refused(tmp_path):
  _, state = saved_runs.random_state(DENSE)

  def refused(message, functions=('to', 'from', 'export'), **changes):
    model = with_kind(DENSE, 'mhc', **changes)
    calls = {
      'to': lambda: interop.to_deepseek(state.params, model),
      'from': lambda: interop.from_deepseek({}, state.params, model),
      'export': lambda: export_lib.export(tmp_path / 'run', tmp_path / 'out'),
    }
    if 'export' in functions:
      workdir_lib.initialize(tmp_path / 'run', config.Config(model=model))
    for name in functions:
      with pytest.raises(ValueError, match=message):
        calls[name]()

  refused("expand_scale='random' cannot be exported", expand_scale='random')
  refused('cannot be exported', ('to',), expand_scale='learned')
  newton = dict(sinkhorn_method='newton', sinkhorn_eps=0.0)
  refused('cannot be exported', ('to',), **newton)
  refused("res='off' leaves no logits of H_res", ('to', 'from'), res='off')
  refused("post='static' would ignore tensors", ('from',), post='static')
  # As for other kinds, an export has our names then.
  names = {
    t.name for t in names_lib.tensors(with_kind(DENSE, 'mhc', res='off'))
  }
  assert {'layers.0.attention_connection.phi', 'hc_head_fn'} <= names
  assert 'layers.0.hc_attn_fn' not in names


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'experts'
  settings, state = saved_runs.save_run(workdir, EXPERTS)
  vocabulary = tokenizer.BPE.train([b'some words'], 258)
  (workdir / 'tokenizer.json').write_text(vocabulary.description)
  return workdir, settings, state


def read(out):
  files = sorted(out.glob('*.safetensors'))
  parts = [safetensors_numpy.load_file(file) for file in files]
  assert sum(map(len, parts)) == len({name for part in parts for name in part})
  return files, {name: t for part in parts for name, t in part.items()}


def check_loaded(out, settings, state):
  got, params, router_bias = interop.load(out)
  assert got == settings
  same(params, state.params)
  if state.router_bias is None:
    assert router_bias is None
  else:
    np.testing.assert_array_equal(router_bias, state.router_bias)


def test_an_export_is_read_back_exactly(run, tmp_path):
  workdir, settings, state = run
  assert export_lib.export(workdir, tmp_path / 'whole') == 7
  check_loaded(tmp_path / 'whole', settings, state)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['whole']
  files, whole = read(tmp_path / 'whole')
  assert [file.name for file in files] == ['model.safetensors']
  settings_file = tmp_path / 'whole' / 'config.json'
  assert files[0].stat().st_mode == settings_file.stat().st_mode
  # Rows of a tensor are what comes out, as in PyTorch, whatever lay in memory.
  experts = state.params['moe_blocks']['ffn']
  np.testing.assert_array_equal(
    whole['layers.2.ffn.experts.3.down.weight'], experts['down'][1, 3].T
  )
  np.testing.assert_array_equal(
    whole['layers.1.ffn.router.bias'], state.router_bias[0]
  )

  # In several files.
  out = tmp_path / 'parts'
  export_lib.export(workdir, out, max_bytes=4000)
  check_loaded(out, settings, state)
  files, parts = read(out)
  same(parts, whole)
  assert len(files) > 3
  assert files[1].name == f'model-00002-of-{len(files):05}.safetensors'
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == sum(
    t.nbytes for t in whole.values()
  )
  assert set(index['weight_map']) == set(whole)
  for file in files:
    with safetensors.safe_open(file, framework='numpy') as opened:
      names = list(opened.keys())
      assert opened.metadata() == {'format': 'pt', 'step': '7'}
    assert all(index['weight_map'][name] == file.name for name in names)
    # The embedding alone is more.
    assert len(names) == 1 or sum(whole[name].nbytes for name in names) <= 4000


@pytest.mark.parametrize(
  'kind', ['residual', 'hc', 'mhc_single_pass', 'orthogonal']
)
def test_exports_of_other_kinds(kind, tmp_path):
  """What DeepSeek has no tensors for keeps our names."""
  model = with_kind(DENSE, kind, collapse='mean')
  settings, state = saved_runs.save_run(tmp_path / 'run', model)
  export_lib.export(tmp_path / 'run', tmp_path / 'out')
  check_loaded(tmp_path / 'out', settings, state)
  _, tensors = read(tmp_path / 'out')
  assert ('layers.0.hc_attn_fn' in tensors) == (kind == 'mhc_single_pass')
  assert ('layers.2.ffn_connection.alpha' in tensors) == (
    kind in ('hc', 'orthogonal')
  )


def test_other_files_are_refused(run, tmp_path):
  workdir, _, _ = run
  with pytest.raises(ValueError, match='not an empty folder: choose another'):
    export_lib.export(workdir, workdir)
  with pytest.raises(ValueError, match='holds no run'):
    export_lib.export(tmp_path, tmp_path / 'x')
  with pytest.raises(ValueError, match='holds no run'):
    interop.load(tmp_path)
  # What is there by any other name is somebody's, and stays.
  mine = tmp_path / 'out.partial' / 'model.safetensors'
  mine.parent.mkdir()
  mine.write_text("a user's own")
  out = tmp_path / 'out'
  export_lib.export(workdir, out)
  assert mine.read_text() == "a user's own"
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'out.partial']
  index = out / 'model.safetensors.index.json'
  for content, message in (
    ('', 'it is empty'),
    ('{"weight_map": []}', 'names None'),
    *(
      (json.dumps({'weight_map': {'a': name}}), f'names {name!r}')
      for name in ('../run/model.safetensors', '/etc/x.safetensors', 'a.pkl')
    ),
  ):
    index.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
      interop.load(out)
  index.unlink()
  file = out / 'model.safetensors'
  _, tensors = read(out)
  router = 'layers.2.ffn.router.weight'
  for change, message in (
    ({router: tensors[router].T.copy()}, r'is float32 \[8, 4\], must be'),
    ({router: tensors[router].astype(np.float16)}, r'is F16 \[4, 8\], must be'),
    ({'lm_head.weight': tensors['norm.weight']}, 'lm_head.* unknown tensor'),
  ):
    safetensors_numpy.save_file(tensors | change, file)
    with pytest.raises(ValueError, match=message):
      interop.load(out)
  del tensors[router]
  safetensors_numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=f'{router}, float32 .* is missing'):
    interop.load(out)
  file.write_bytes(b'no such format')
  with pytest.raises(ValueError, match='not a safetensors file'):
    interop.load(out)
  file.unlink()
  with pytest.raises(OSError, match=r'model\.safetensors'):
    interop.load(out)


def rotated(x, theta=10_000.0):
  """[t, ..., r]: the pairs (i, i + r/2) of position p turned."""
  half = x.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
  angles = angles.reshape(len(x), *[1] * (x.ndim - 2), half)
  a, b = x[..., :half], x[..., half:]
  cos, sin = np.cos(angles), np.sin(angles)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def read_by_the_book(w, settings, tokens):
  """Logits of tokens [t], from a file's tensors and docs/interop.md alone."""
  c, n = settings['attention'], settings['connection']['num_streams']
  heads, k, rank = c['num_heads'], c['head_dim'], c['kv_rank']

  def attention(x, p):
    time = len(x)
    query = normed(x @ w[f'{p}query_down.weight'].T)
    query = query * w[f'{p}query_norm.weight'] @ w[f'{p}query.weight'].T
    query = query.reshape(time, heads, -1)
    down = x @ w[f'{p}down.weight'].T
    latent = normed(down[:, :rank]) * w[f'{p}norm.weight']
    up = (latent @ w[f'{p}up.weight'].T).reshape(time, heads, 2 * k)
    scores = np.einsum('thk,shk->hts', query[..., :k], up[..., :k])
    scores = scores + np.einsum(
      'thr,sr->hts', rotated(query[..., k:]), rotated(down[:, rank:])
    )
    scores = scores / np.sqrt(query.shape[-1])
    scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
    mixed = np.einsum('hts,shk->thk', softmax(scores), up[..., k:])
    return mixed.reshape(time, -1) @ w[f'{p}out.weight'].T

  def swiglu(x, p):
    gate = x @ w[f'{p}gate.weight'].T
    return (
      gate
      * sigmoid(gate)
      * (x @ w[f'{p}up.weight'].T)
      @ (w[f'{p}down.weight'].T)
    )

  def ffn(x, p):
    if f'{p}router.weight' not in w:
      return swiglu(x, p)
    scores, out = (
      sigmoid(x @ w[f'{p}router.weight'].T),
      swiglu(x, f'{p}shared.'),
    )
    for t, score in enumerate(scores):
      best = np.argsort(-(score + w[f'{p}router.bias']))
      best = best[: settings['moe']['experts_per_token']]
      for e in best:
        y = swiglu(x[t : t + 1], f'{p}experts.{e}.')[0]
        out[t] += score[e] / sum(score[best]) * y
    return out

  def hc(name):
    return [w[f'{name}_{role}'] for role in ('fn', 'base', 'scale')]

  x = np.repeat(w['embed.weight'][tokens][:, None], n, axis=1)
  for block in range(settings['num_blocks']):
    p = f'layers.{block}.'
    for site, norm, function in (
      (
        'hc_attn',
        'attention_norm',
        lambda h, p=p: attention(h, f'{p}attention.'),
      ),
      ('hc_ffn', 'ffn_norm', lambda h, p=p: ffn(h, f'{p}ffn.')),
    ):
      pre, post, comb = coefficients(x, *hc(p + site))
      h = np.sum(pre[..., None] * x, axis=-2)
      y = function(normed(h) * w[f'{p}{norm}.weight'])
      x = post[..., None] * y[:, None] + np.einsum('tji,tjd->tid', comb, x)
  h = normed(deepseek_head(x, *hc('hc_head'))) * w['norm.weight']
  return h @ w['head.weight'].T


def test_the_main_writes_what_others_can_read(launch, run, tmp_path):
  """From numpy, the file and its config to the model's own logits."""
  workdir, settings, state = run
  arguments = (f'--workdir={workdir}', f'--out={tmp_path / "out"}')
  result = launch('export.py', *arguments, cold=True)
  assert result.returncode == 0, result.stderr
  assert 'after 7 updates' in result.stdout
  assert (tmp_path / 'out' / 'tokenizer.json').exists()
  assert (tmp_path / 'out' / 'config.json').read_text() == (
    workdir / 'config.json'
  ).read_text()
  again = launch('export.py', *arguments)
  assert again.returncode == 2
  assert 'is not an empty folder' in again.stderr

  _, tensors = read(tmp_path / 'out')
  wide = {name: t.astype(np.float64) for name, t in tensors.items()}
  model = json.loads((tmp_path / 'out' / 'config.json').read_text())['model']
  tokens = np.random.default_rng(0).integers(0, 258, 7)
  want = read_by_the_book(wide, model, tokens)
  graphdef, _ = nnx.split(
    nnx.eval_shape(
      lambda: transformer.Transformer(settings.model, rngs=nnx.Rngs(0))
    )
  )
  ours = nnx.merge(graphdef, nnx.State(state.params))
  got = ours(jnp.asarray(tokens[None], jnp.int32), state.router_bias)[0]
  assert np.std(want) > 0.3
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
