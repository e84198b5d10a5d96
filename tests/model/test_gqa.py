"""Grouped-query attention, its rotation and the tied head, against NumPy."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.model import attention
from mhc.model import gqa
from mhc.model import rope
from mhc.model import transformer

WIDTH, TIME = 12, 7
SETTINGS = config.AttentionConfig(
  kind='gqa',
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  rope_dim=4,
  qkv_bias=True,
  qk_norm=True,
)
SCALINGS = {
  'linear': config.RopeScalingConfig('linear', factor=4),
  'llama3': config.RopeScalingConfig('llama3', factor=8, original_length=64),
  'yarn': config.RopeScalingConfig(
    'yarn', factor=40, original_length=32, mscale=0.7, mscale_all_dim=1
  ),
}


def layer(settings=SETTINGS):
  """With generic parameters."""
  module = gqa.GQA(settings, WIDTH, 1e-20, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  moved = jax.tree.map(
    lambda p: p + np.float32(0.3) * rng.normal(size=p.shape).astype('float32'),
    nnx.state(module),
  )
  nnx.update(module, moved)
  return module


def inputs(batch=2):
  shape = batch, TIME, WIDTH
  return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


whole = jax.jit(lambda module, x: module(x)[0])
decode = jax.jit(lambda module, *given: module.decode(*given))


def by_hand(module, x):
  """A head and a query at a time, in float64; pairs are complex numbers."""
  c, wide = module.config, np.float64(x)
  each = c.num_heads // c.num_kv_heads

  def heads(part):
    linear = getattr(module, part)
    y = wide @ np.float64(linear.weight[...])
    if c.qkv_bias:
      y = y + np.float64(linear.bias[...])
    y = y.reshape(*y.shape[:2], -1, c.head_dim)
    norm = getattr(module, f'{part}_norm', None)
    if norm is not None:
      y = y / np.sqrt(np.mean(y**2, -1, keepdims=True))
      y = y * np.float64(norm.gain[...])
    if part == 'value':
      return y
    half = c.rotated // 2
    pairs = y[..., :half] + 1j * y[..., half : 2 * half]
    turn = np.arange(TIME)[:, None] * np.float64(rope.rates(c))
    pairs = pairs * np.exp(1j * turn)[:, None] * rope.lengthening(c)
    return np.concatenate([pairs.real, pairs.imag, y[..., 2 * half :]], axis=-1)

  query, key, value = map(heads, ('query', 'key', 'value'))
  mixed = np.zeros(query.shape)
  for head in range(c.num_heads):
    for t in range(TIME):
      keys = key[:, : t + 1, head // each]
      logits = np.einsum('bk,bsk->bs', query[:, t, head], keys)
      logits = np.exp(logits * rope.logit_scale(c))
      mixed[:, t, head] = np.einsum(
        'bs,bsk->bk',
        logits / logits.sum(1, keepdims=True),
        value[:, : t + 1, head // each],
      )
  return mixed.reshape(*wide.shape[:2], -1) @ np.float64(module.out.weight[...])


@pytest.mark.parametrize(
  'settings',
  [
    SETTINGS,
    config.AttentionConfig(
      kind='gqa', num_heads=4, num_kv_heads=4, head_dim=8, rope_dim=0
    ),
    dataclasses.replace(SETTINGS, rope_scaling=SCALINGS['yarn']),
  ],
  ids=['groups', 'multi-head', 'yarn'],
)
def test_it_is_the_formula_and_decodes_alike(settings):
  module, x = layer(settings), inputs()
  got = whole(module, x)
  np.testing.assert_allclose(got, by_hand(module, x), atol=2e-5)
  cache = module.empty_cache(settings, (2, TIME + 2), 'float32')
  first, cache, _ = decode(module, x[:, :4], cache, jnp.asarray(0))
  then, *_ = decode(module, x[:, 4:], cache, jnp.asarray(4))
  decoded = jnp.concatenate([first, then], axis=1)
  np.testing.assert_allclose(decoded, got, atol=1e-5)


def test_groups_are_repeated_heads():
  """Output and gradient, of blocks and of the kernel (interpreted)."""
  rng = np.random.default_rng(3)
  query, key, value = (
    jnp.asarray(rng.normal(size=(1, 128, heads, 16)), jnp.float32)
    for heads in (4, 2, 2)
  )

  def out(attend, repeats, *arrays):
    query, *narrow = arrays
    wide = (jnp.repeat(x, repeats, axis=2) for x in narrow)
    return jnp.sum(jnp.sin(attend(query, *wide, 0.25)))

  def both(attend, repeats):
    run = jax.value_and_grad(out, argnums=(2, 3, 4))
    return jax.jit(run, static_argnums=(0, 1))(
      attend, repeats, query, key, value
    )

  want = both(attention.in_blocks, 2)
  for got in both(attention.in_blocks, 1), both(attention.by_kernel, 1):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want
    )


def test_rates():
  """Fast pairs keep their rates, slow ones turn `factor` times slower."""
  plain = rope.rates(SETTINGS)
  np.testing.assert_allclose(plain, [1, 10_000**-0.5], rtol=1e-6)
  long = dataclasses.replace(SETTINGS, head_dim=64, rope_dim=64)
  for kind, scaling in SCALINGS.items():
    scaled = rope.rates(dataclasses.replace(long, rope_scaling=scaling))
    ratio = scaled / rope.rates(long)
    np.testing.assert_allclose(ratio[-1], 1 / scaling.factor, rtol=1e-6)
    assert ratio[0] == (1 / scaling.factor if kind == 'linear' else 1)
    assert (np.diff(ratio) <= 1e-6).all()
  yarn = dataclasses.replace(long, rope_scaling=SCALINGS['yarn'])
  m = 1 + 0.1 * math.log(40)
  assert rope.lengthening(yarn) == (1 + 0.07 * math.log(40)) / m
  assert rope.logit_scale(yarn) == 64**-0.5 * m**2


def test_a_tied_head_is_the_embedding():
  """And its gradient is the sum of both uses."""
  tied = config.ModelConfig(
    num_blocks=1,
    dim=16,
    ffn_dim=16,
    tied_embeddings=True,
    connection=config.ConnectionConfig('residual'),
    attention=dataclasses.replace(SETTINGS, qk_norm=False),
  )
  untied = dataclasses.replace(tied, tied_embeddings=False)
  model = transformer.Transformer(tied, rngs=nnx.Rngs(0))
  other = transformer.Transformer(untied, rngs=nnx.Rngs(1))
  params = nnx.to_pure_dict(nnx.state(model))
  assert 'head' not in params
  head = {'head': {'weight': params['embed']['table'].T}}
  tokens = jnp.asarray(np.random.default_rng(0).integers(320, size=(2, 9)))

  def loss(graphdef, params):
    logits = nnx.merge(graphdef, nnx.State(params))(tokens)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)

  run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
  got, grads = run(nnx.graphdef(model), params)
  want, two = run(nnx.graphdef(other), params | head)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  both = two['embed']['table'] + two['head']['weight'].T
  np.testing.assert_allclose(grads['embed']['table'], both, atol=1e-6)


def test_settings_that_do_nothing_are_refused():
  for changes, message in (
    ({'kind': 'mla', 'num_kv_heads': 2}, 'num_kv_heads=2 would not be used'),
    ({'kv_rank': 3}, 'kv_rank=3 would not be used'),
    ({'num_kv_heads': 4}, 'num_kv_heads=4 must divide num_heads=6'),
    ({'rope_dim': 10}, 'rope_dim=10 of head_dim=8 must'),
    ({'head_dim': 7, 'rope_dim': 0}, 'rope_dim=0 of head_dim=7 must'),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SETTINGS, **changes)
  for changes, message in (
    ({'factor': 2.0}, "rope_scaling.factor=2.0 would not be used with kind='n"),
    (
      {'kind': 'llama3', 'factor': 2.0},
      "kind='llama3' wants .*original_length",
    ),
    ({'kind': 'linear', 'factor': 0.5}, 'rope_scaling.factor=0.5 must be at l'),
    (
      {'kind': 'yarn', 'original_length': 8, 'beta_slow': 32.0},
      r'beta_slow=32.0 must be less than beta_fast=32.0',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      config.RopeScalingConfig(**changes)
