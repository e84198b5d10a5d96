"""Matrices and a vocabulary that are split over devices."""

from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from mhc import axes
from mhc.parallel import fsdp
from mhc.parallel import vocab_parallel


def mesh_of(**sizes):
  shape = [sizes.get(axis, 1) for axis in axes.AXES]
  number = int(np.prod(shape))
  return jax.make_mesh(
    tuple(shape),
    axes.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:number],
  )


def test_gradients_of_gathered_matrices_are_summed_in_float32():
  """Of a product in bfloat16, on four devices with two rows each."""
  specs = {
    'up': {'weight': P(None, 'data')},
    'router': {'weight': P('data')},
  }
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'up': {'weight': jax.random.normal(keys[0], (6, 8))},
    'router': {'weight': jax.random.normal(keys[1], (8, 3))},
  }
  x = jax.random.normal(keys[2], (8, 6), jnp.bfloat16)

  def loss(params, x):
    h = x @ params['up']['weight'].astype(jnp.bfloat16)
    return jnp.sum(h.astype(jnp.float32) @ params['router']['weight'])

  def local(params, x):
    def gathered(params):
      whole = fsdp.gather(
        params, specs, 'bfloat16', above=('moe_blocks', 'ffn')
      )
      assert whole['up']['weight'].dtype == jnp.bfloat16
      assert whole['router']['weight'].dtype == jnp.float32
      assert whole['up']['weight'].shape == (6, 8)
      return loss(whole, x)

    grads = jax.grad(gathered)(axes.cast_varying_everywhere(params))
    return jax.tree.map(fsdp.psum_replicated, grads, specs)

  got = jax.jit(
    jax.shard_map(
      local, mesh=mesh_of(data=4), in_specs=(specs, P('data')), out_specs=specs
    )
  )(params, x)
  want = jax.tree.map(
    lambda *parts: sum(parts[1:], parts[0]),
    *(jax.jit(jax.grad(loss))(params, part) for part in jnp.split(x, 4)),
  )
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)


def test_scatter_gives_each_device_its_part_of_the_sum():
  specs = {'weight': P('data'), 'gain': P()}
  values = {'weight': jnp.arange(8.0), 'gain': jnp.arange(3.0)}

  def local(values):
    values = axes.cast_varying_everywhere(values)
    number = jax.lax.axis_index('data').astype(jnp.float32)
    return fsdp.scatter(jax.tree.map(lambda v: v * number, values), specs)

  got = jax.jit(
    jax.shard_map(local, mesh=mesh_of(data=4), in_specs=P(), out_specs=specs)
  )(values)
  for name, value in values.items():
    np.testing.assert_allclose(got[name], value * 6)


@pytest.mark.parametrize('split', [0, 1])
def test_a_vocabulary_of_awkward_size_is_scattered_in_two_pieces(split):
  """58 columns: 29 tiles of two, and 28 without a large factor."""
  spec = P('data') if split == 0 else P(None, 'data')
  shape = (8, 58) if split == 0 else (58, 8)
  value = jax.random.normal(jax.random.key(0), shape)

  def local(value):
    value = axes.cast_varying_everywhere(value)
    return fsdp.scatter(value, spec)

  scatter = jax.jit(
    jax.shard_map(local, mesh=mesh_of(data=4), in_specs=P(), out_specs=spec)
  )
  with mock.patch.object(fsdp, 'TILE', 2):
    text = str(jax.make_jaxpr(scatter)(value))
    np.testing.assert_allclose(scatter(value), 4 * value, rtol=1e-6)
  assert text.count('reduce_scatter[') == 2


def test_sizes_that_tpus_sum_up_in_parts():
  awkward = {64640: 480, 129280: 960, 128 * 101: 100, 128 * 504: 480}
  awkward = {size: 128 * tiles for size, tiles in awkward.items()}
  fine = (100, 1280, 8192, 65536, 128 * 128, 128 * 960)
  for size, divisible in (awkward | {one: one for one in fine}).items():
    assert fsdp._divisible(size) == divisible


def test_axes_are_joined():
  def local(x, y):
    assert axes.varying_axes((x, y)) == {'data', 'pipe'}
    a, b = axes.unify_varying(x, y)
    assert axes.varying_axes(a) == axes.varying_axes(b) == {'data', 'pipe'}
    assert axes.cast_varying(a, ('data',)) is a
    return a + b

  jax.eval_shape(
    jax.shard_map(
      local,
      mesh=mesh_of(data=2, pipe=2),
      in_specs=(P('data'), P('pipe')),
      out_specs=P(('data', 'pipe')),
    ),
    jnp.ones(4),
    jnp.ones(4),
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_cross_entropy_of_a_split_vocabulary(dtype):
  """Values and both gradients, logits far from zero among them.

  Sums of bfloat16 products are float32; the gradient's products round.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  h = 20 * jax.random.normal(keys[0], (10, 6), dtype)
  weight = jax.random.normal(keys[1], (6, 16), dtype)
  targets = jax.random.randint(keys[2], 10, 0, 16)
  cotangent = jax.random.normal(keys[3], 10)

  def split(h, weight):
    def local(h, weight, targets, g):
      args = axes.cast_varying_everywhere((h, weight))
      nats, pull = jax.vjp(
        lambda *a: vocab_parallel.cross_entropy(*a, targets), *args
      )
      dh, dw = pull(axes.cast_varying_everywhere(g))
      same = lambda x: jax.lax.pmean(x, axes.AXES)
      return same(nats), same(dh), fsdp.psum_replicated(dw, P(None, 'pipe'))

    return jax.shard_map(
      local,
      mesh=mesh_of(pipe=4),
      in_specs=(P(), P(None, 'pipe'), P(), P()),
      out_specs=(P(), P(), P(None, 'pipe')),
    )(h, weight, targets, cotangent)

  def whole(h, weight):
    logits = h.astype(jnp.float32) @ weight.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

  nats, pull = jax.vjp(whole, h, weight)
  got, *got_grads = jax.jit(split)(h, weight)
  np.testing.assert_allclose(got, nats, rtol=1e-5, atol=1e-4)
  rtol, atol = (1e-5, 1e-4) if dtype == 'float32' else (0.02, 0.2)
  for a, b in zip(got_grads, pull(cotangent), strict=True):
    a, b = (np.asarray(one, np.float64) for one in (a, b))
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
