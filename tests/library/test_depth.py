"""Depth routing against float64 models of the papers' formulas."""

import functools

from flax import nnx
import float64
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.connections import depth
from mhc.model import transformer
from mhc.parallel import counts

DIM, DEPTH, TOKENS, HEADS = 8, 6, 5, 2


def sublayer(weights, index, h):
  """A sub-layer with its norm, as numpy or JAX has it."""
  module = np if isinstance(h, np.ndarray) else jnp
  norm = module.sqrt((h * h).mean(-1, keepdims=True))
  return module.tanh(h / norm @ weights[index])


def softmax(x):
  x = np.exp(x - x.max(0))
  return x / x.sum(0)


def attn_res(params, weights, v0, runs, heads=1):
  """AttnRes by blocks, Sec. 3 and 4 of 2603.15031, on float64 arrays.

  With heads, MHAR of 2607.27230: a softmax for each group of channels. `params`
  are the queries of the sub-layers, then that of the last read.
  """

  def read(query, sources):
    normed = [v / np.sqrt((v * v).mean(-1, keepdims=True)) for v in sources]
    read, width = [], DIM // heads
    for first in range(0, DIM, width):
      group = slice(first, first + width)
      scores = [v[:, group] @ query[group] for v in normed]
      shares = zip(softmax(np.stack(scores)), sources, strict=True)
      read.append(sum(s[:, None] * v[:, group] for s, v in shares))
    return np.concatenate(read, axis=1)

  blocks, partial, run = [v0], None, 0
  for index in range(DEPTH):
    if index * runs // DEPTH != run:
      blocks.append(partial)
      run, partial = index * runs // DEPTH, None
    sources = blocks if partial is None else [*blocks, partial]
    y = sublayer(weights, index, read(params[index], sources))
    partial = y if partial is None else partial + y
  return read(params[-1], [*blocks, partial])


def dense_former(params, weights, v0):
  """Eq. 2 of 2402.02622: row i of `params` weighs what block i hands on."""
  outputs, y = [v0], v0
  for block in range(DEPTH // 2):
    y = y + sublayer(weights, 2 * block, y)
    y = y + sublayer(weights, 2 * block + 1, y)
    outputs.append(y)
    row = params[block + 1]
    y = sum(row[j] * v for j, v in enumerate(outputs))
  return y


def x0(params, weights, v0):
  x = v0
  for index in range(DEPTH):
    if index % 2 == 0:
      a, b = params[index // 2]
      x = a * x + b * v0
    x = x + sublayer(weights, index, x)
  return x


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(float64.DTYPE)


def run(modules, collapse, weights, v0, slots, kind='attn_res'):
  """Our connections around the same sub-layers."""
  x = depth.open_slots(v0, slots, 'attn_res' if kind == 'mhar' else kind)
  h, context = modules[0].pre(x)
  for index in range(DEPTH):
    y = sublayer(weights, index, h)
    if index + 1 < DEPTH:
      h, context = modules[index + 1].advance(y, context)
  return collapse(modules[-1].post(y, context))


def ours(kind, slots, traced=False):
  """The connections of a network; `traced` as the stacked blocks have them."""

  def make(index):
    options = dict(is_first=index % 2 == 0)
    at = jnp.asarray(index) if traced else index
    match kind:
      case 'attn_res':
        return depth.AttnRes(DIM, slots, at, depth=DEPTH)
      case 'mhar':
        return depth.AttnRes(DIM, slots, at, depth=DEPTH, num_heads=HEADS)
      case 'dense_former':
        return depth.DenseFormer(DIM, slots, at, **options)
      case 'x0':
        return depth.X0(DIM, at, **options)

  collapse = depth.SlotCollapse(
    'attn_res' if kind == 'mhar' else kind,
    DIM,
    slots,
    num_heads=HEADS if kind == 'mhar' else 1,
  )
  return [make(i) for i in range(DEPTH)], collapse


def set_up(kind, runs, seed=1):
  """Parameters, and (ours, theirs) as functions of (parameters, v0)."""
  weights = 0.3 * numbers(DEPTH, DIM, DIM, seed=seed)
  if kind in ('attn_res', 'mhar'):
    params, slots = numbers(DEPTH + 1, DIM, seed=seed + 1), runs + 1
    heads = HEADS if kind == 'mhar' else 1
    oracle = functools.partial(attn_res, runs=runs, heads=heads)
    own = lambda p: [{'query': q} for q in p]
  elif kind == 'dense_former':
    params, slots = numbers(DEPTH // 2 + 1, DEPTH // 2 + 1, seed=seed), 4
    oracle = dense_former
    own = lambda p: [
      *({'weights': p[i // 2]} if i % 2 == 0 else {} for i in range(DEPTH)),
      {'weights': p[-1]},
    ]
  else:
    params, slots, oracle = numbers(DEPTH // 2, 2, seed=seed), 2, x0
    own = lambda p: [
      *({'scales': p[i // 2]} if i % 2 == 0 else {} for i in range(DEPTH)),
      {},
    ]
  return weights, params, slots, oracle, own


CASES = [('attn_res', 6), ('attn_res', 4), ('attn_res', 1)]
CASES += [('mhar', 6), ('mhar', 2), ('dense_former', 0), ('x0', 0)]


@pytest.mark.parametrize(('kind', 'runs'), CASES)
def test_the_formula(kind, runs):
  """The result, and the gradient with respect to everything."""
  weights, params, slots, oracle, own = set_up(kind, runs)
  v0, cotangent = numbers(TOKENS, DIM, seed=7), numbers(TOKENS, DIM, seed=8)

  def mine(params, weights, v0):
    modules, collapse = ours(kind, slots)
    for module, values in zip([*modules, collapse], own(params), strict=True):
      for name, value in values.items():
        getattr(module, name)[...] = value
    return run(modules, collapse, weights, v0, slots, kind)

  arguments = params, weights, v0
  found, back = jax.vjp(jax.jit(mine), *map(jnp.asarray, arguments))
  wide = [np.asarray(a, np.float64) for a in arguments]

  within = float64.tolerance(2e-6)
  np.testing.assert_allclose(found, oracle(*wide), rtol=within, atol=within)
  within = float64.tolerance(2e-5, 1e-6)
  rng = np.random.default_rng(0)
  for number, gradient in enumerate(back(jnp.asarray(cotangent))):
    # Along a few random directions, by central differences in float64.
    for _ in range(3):
      direction = rng.normal(size=wide[number].shape)

      def at(step, n=number, direction=direction):
        moved = list(wide)
        moved[n] = wide[n] + step * direction
        return oracle(*moved)

      want = ((at(1e-6) - at(-1e-6)) / 2e-6 * cotangent).sum()
      got = (np.asarray(gradient, np.float64) * direction).sum()
      np.testing.assert_allclose(got, want, rtol=within, atol=within)


@pytest.mark.parametrize('kind', ['attn_res', 'dense_former', 'x0'])
def test_a_traced_place_is_a_whole_one(kind):
  slots = {'attn_res': 4, 'dense_former': 4, 'x0': 2}[kind]
  weights, v0 = numbers(DEPTH, DIM, DIM), numbers(TOKENS, DIM, seed=3)
  found = [
    run(*ours(kind, slots, traced), weights, jnp.asarray(v0), slots, kind)
    for traced in (False, True)
  ]
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize('kind', ['dense_former', 'x0'])
def test_starts_as_the_plain_network(kind):
  slots = {'dense_former': 4, 'x0': 2}[kind]
  weights, v0 = numbers(DEPTH, DIM, DIM), numbers(TOKENS, DIM, seed=3)
  x = jnp.asarray(v0)
  for index in range(DEPTH):
    x = x + sublayer(weights, index, x)
  found = run(*ours(kind, slots), weights, jnp.asarray(v0), slots, kind)
  np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-6)


def test_attn_res_starts_as_the_mean_of_its_sources():
  weights, v0 = numbers(DEPTH, DIM, DIM), numbers(TOKENS, DIM, seed=3)
  zeros = np.zeros((DEPTH + 1, DIM))
  want = attn_res(zeros, weights.astype(float), v0.astype(float), 3)
  found = run(*ours('attn_res', 4), weights, jnp.asarray(v0), 4)
  np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
  for slots in (1, 8):
    with pytest.raises(ValueError, match=rf'{slots} slots .*take from 2 to 7'):
      depth.AttnRes(DIM, slots, 0, depth=DEPTH)
  with pytest.raises(ValueError, match=r'num_streams=10 .*from 2 to 9'):
    config_lib.ModelConfig(
      num_blocks=4,
      connection=config_lib.ConnectionConfig(
        kind='attn_res_block', num_streams=10
      ),
    )
  with pytest.raises(ValueError, match=r'3 heads do not divide dim=8'):
    depth.AttnRes(DIM, 4, 0, depth=DEPTH, num_heads=3)
  with pytest.raises(ValueError, match=r'depth_heads=3 of mhar must divide'):
    config_lib.ModelConfig(
      connection=config_lib.ConnectionConfig(kind='mhar', depth_heads=3)
    )
  for name, value in (('collapse', 'sum'), ('pre', 'off'), ('depth_heads', 2)):
    with pytest.raises(ValueError, match=f'connection.{name}=.*not be used'):
      config_lib.ConnectionConfig(kind='x0', **{name: value})


@pytest.mark.parametrize(
  ('kind', 'own'),
  [
    ('attn_res', 9 * 64),
    ('attn_res_block', 9 * 64),
    ('mhar', 9 * 64),
    ('dense_former', 5 * 4 + 5),
    ('x0', 2 * 4),
  ],
)
def test_parameters_are_counted_to_the_digit(kind, own):
  """Of four blocks of width 64: those of a residual, and these."""
  model = config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig(kind=kind)
  )
  plain, found = (counts.count(m, 16) for m in (model.plain, model))
  assert found['total_params'] - plain['total_params'] == own
  assert found['connection_params'] == own


@pytest.mark.parametrize(
  'kind',
  [
    kind if kind == 'x0' else pytest.param(kind, marks=pytest.mark.slow)
    for kind in config_lib.DEPTH_KINDS
  ],
)
def test_tokens_see_the_past_alone(kind):
  """By gradients of the logits, and by decoding one token after the other."""
  settings = config_lib.ModelConfig(
    num_blocks=2,
    dim=16,
    ffn_dim=16,
    recompute='none',
    connection=config_lib.ConnectionConfig(kind=kind, num_streams=3),
  )
  graph, _ = transformer.abstract(settings)
  state = generic_states.of_model(settings, seed=1, moved=0.3)
  state = jax.tree.map(jnp.asarray, state)
  tokens = jax.random.randint(jax.random.key(2), (1, 6), 0, 300)
  embedded = state['embed']['table']

  @jax.jit
  @jax.grad
  def gradient_at(rows, position):
    own = {**state, 'embed': {'table': rows}}
    return nnx.merge(graph, nnx.State(own))(tokens)[0, position].sum()

  for position in (0, 3):
    gradient = gradient_at(embedded, position)
    for later in tokens[0, position + 1 :]:
      if later not in tokens[0, : position + 1]:
        assert not np.any(gradient[later])
  model = nnx.merge(graph, nnx.State(state))
  cache = model.empty_cache(1, 6)
  whole = jax.jit(lambda model: model(tokens))(model)
  decode = jax.jit(lambda *given: model.decode(*given))
  for at_ in range(6):
    logits, cache = decode(tokens[:, at_ : at_ + 1], cache, jnp.int32(at_))
    np.testing.assert_allclose(logits[:, 0], whole[:, at_], atol=1e-4)
