"""Kernels against the reference in float64, and compiled for TPUs."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.kernels import api
from mhc.kernels import chips
from mhc.kernels import parity
from mhc.kernels import reference
from mhc.kernels import shapes
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import launch
from mhc.kernels.pallas import sinkhorn
from mhc.kernels.pallas import specs
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.planner import bundles
from mhc.planner import kernel_cost
from mhc.planner import targets
from mhc.training import step


def both_ways(function):
  """(arguments, cotangent) -> the output and every gradient, compiled."""

  def run(*arguments):
    out, pull_back = jax.vjp(function, *arguments[:-1])
    return out, *pull_back(arguments[-1])

  return jax.jit(run)


@functools.cache
def specified(operation, *static):
  """The reference, both ways; one program for the operands of all dtypes."""
  return both_ways(lambda *args: getattr(reference, operation)(*args, *static))


def exact(operation, static, operands, cotangent):
  """Output and gradients of the reference in float64."""
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a, np.float64)), (*operands, cotangent)
    )
    return jax.device_get(specified(operation, *static)(*wide))


def normal(seed):
  """Draws arrays of a shape; nothing is compiled."""
  rng = np.random.default_rng(seed)
  return lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ('n', 'eps'),
  [
    (3, 0.0),
    (4, 1e-6),
    *(
      pytest.param(*each, marks=pytest.mark.slow)
      for each in itertools.product((2, 3, 4, 8), (0.0, 1e-6))
      if each not in ((3, 0.0), (4, 1e-6))
    ),
  ],
)
def test_sinkhorn_in_float64(n, eps):
  """Ragged tokens, logits up to a standard deviation of 5, any cotangent."""
  draw, num_tokens = normal(n), sinkhorn.TOKENS + 77
  spread = jnp.linspace(0.1, 5, num_tokens)[None, None]
  logits = spread * draw(n, n, num_tokens)
  cotangent = draw(*logits.shape)
  results = both_ways(lambda x: sinkhorn.sinkhorn(x, 20, eps, True))(
    logits, cotangent
  )
  want = exact('sinkhorn', (20, eps), [logits], cotangent)
  for got, exactly in zip(results, want, strict=True):
    np.testing.assert_allclose(got, exactly, rtol=0, atol=2e-6)


@pytest.mark.parametrize('num_iters', [1, 2])
def test_few_iterations_and_few_tokens(num_iters):
  draw = normal(0)
  logits, cotangent = 3 * draw(4, 4, 5), draw(4, 4, 5)
  results = both_ways(lambda x: sinkhorn.sinkhorn(x, num_iters, 0.0, True))(
    logits, cotangent
  )
  want = exact('sinkhorn', (num_iters, 0.0), [logits], cotangent)
  for got, exactly in zip(results, want, strict=True):
    np.testing.assert_allclose(got, exactly, rtol=0, atol=2e-6)


def test_extreme_logits_stay_finite():
  logits = 1e4 * normal(0)(4, 4, 200)
  cotangent = jnp.abs(normal(1)(4, 4, 200))
  out, grads = both_ways(lambda x: sinkhorn.sinkhorn(x, 20, 0.0, True))(
    logits, cotangent
  )
  np.testing.assert_allclose(np.sum(out, axis=1), 1, rtol=1e-5)
  assert np.isfinite(grads).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def drawn(n, dim, num_tokens):
  keys = jax.random.split(jax.random.key(n * dim + num_tokens), 7)
  k = 2 * n + n * n
  logits = jax.random.normal(keys[2], (n, n, num_tokens))
  return (
    jax.random.normal(keys[0], (num_tokens, n, dim)),
    jax.random.normal(keys[1], (num_tokens, dim)),
    2 * jax.nn.sigmoid(jax.random.normal(keys[3], (n, num_tokens))),
    reference.sinkhorn(logits, 20, 0.0),
    0.1 * jax.random.normal(keys[4], (n * dim, k)),
    jax.random.normal(keys[5], (n,)),
  )


def arguments(operation, n, dim, num_tokens, dtype):
  """Random operands of an operation on streams, and what is static."""
  x, y, post, res, phi, bias = drawn(n, dim, num_tokens)
  written = (x.astype(dtype), y.astype(dtype), post, res)
  x, reading = written[0], (phi, jnp.float32(0.7), bias)
  return {
    'pre': ((x, *reading), (1e-20,)),
    'post': (written, ()),
    'advance': ((*written, *reading), (1e-20,)),
    'collapse': (written, ()),
  }[operation]


def compare(operation, implementation, shape, dtype, tolerance):
  """Results and all gradients against float64, relative to their scale.

  That of alpha is the biases': both add up the same gradients of the logits.
  """
  operands, static = arguments(operation, *shape, dtype)
  run = lambda *args: getattr(api, operation)(*args, *static, implementation)
  out = jax.eval_shape(run, *operands)
  keys = iter(jax.random.split(jax.random.key(1), 3))
  cotangent = jax.tree.map(
    lambda o: jax.random.normal(next(keys), o.shape).astype(o.dtype), out
  )
  got = both_ways(run)(*operands, cotangent)
  want = jax.tree.leaves(exact(operation, static, operands, cotangent))
  for a, b in zip(jax.tree.leaves(got), want, strict=True):
    scale = np.abs(b if b.ndim else want[-1]).max()
    error = np.abs(np.asarray(a, np.float64) - b).max() / scale
    assert error < tolerance, (operation, a.shape, error)


OPERATIONS = ('pre', 'post', 'advance', 'collapse')
FOUR = shapes.TINY[1:2]
CASES = [
  # `advance` is `post` and `pre`.
  ('advance', 'bfloat16', shapes.TINY[2]),
  *(
    pytest.param('advance', 'bfloat16', shape, marks=pytest.mark.slow)
    for shape in (*shapes.TINY[:2], *shapes.TINY[3:])
  ),
  *itertools.product(['pre', 'post', 'collapse'], ['bfloat16'], FOUR),
  *itertools.product(OPERATIONS[:3], ['float32'], FOUR),
]


@pytest.mark.parametrize(('operation', 'dtype', 'shape'), CASES, ids=str)
def test_streams_in_float64(operation, dtype, shape, monkeypatch):
  """bfloat16 within 2 ulp of the largest value, float32 within 2e-5.

  Small tiles, so that there are several; the larger ones run the same code.
  """
  monkeypatch.setattr(launch, 'TOKENS', (16,))
  tolerance = {'bfloat16': 2 * 2**-8, 'float32': 2e-5}[dtype]
  compare(operation, 'pallas', shape, jnp.dtype(dtype), tolerance)


def test_groups_of_a_larger_matrix_unit(monkeypatch):
  """16 tokens of four streams are mixed at once where 256 rows are."""
  monkeypatch.setattr(launch, 'TOKENS', (32,))
  monkeypatch.setattr(launch, 'machine', lambda: ('cpu', chips.CHIPS['v6e']))
  groups = []
  mix = block_diagonal.mix

  def noted(matrices, rows, stream_rows, *rest):
    groups.append(len(stream_rows[0]))
    return mix(matrices, rows, stream_rows, *rest)

  monkeypatch.setattr(block_diagonal, 'mix', noted)
  dtype = jnp.dtype('bfloat16')
  compare('advance', 'pallas', (4, 128, 70), dtype, 2 * 2**-8)
  assert set(groups) == {16}


def test_h_z_and_their_gradients_are_of_the_streams_as_written():
  """Of x' as it was rounded, both ways: what is float32 is right as such.

  H_post and H_res meet dx', which is rounded to bfloat16 in every
  implementation.
  """
  operands = parity.operands('advance', 4, 128, 37, jnp.bfloat16)
  errors = parity.errors('advance', operands, (1e-20,), 'pallas')
  for tensor, largest, bound in errors:
    if tensor not in ('d post', 'd res'):
      assert largest < bound, (tensor, largest, bound)


def test_a_tile_as_wide_as_a_register():
  compare('post', 'pallas', (2, 128, 140), jnp.dtype('bfloat16'), 2 * 2**-8)


@pytest.mark.parametrize('operation', ['pre', 'post', 'advance', 'collapse'])
def test_plain_jax_in_float64(operation):
  compare(operation, 'xla', (4, 128, 20), jnp.float32, 2e-5)


def test_the_choice_of_an_implementation():
  logits = normal(0)(3, 3, 10)
  plain = api.sinkhorn(logits, 20, 0.0, 'xla')
  np.testing.assert_array_equal(api.sinkhorn(logits, 20, 0.0), plain)
  kernel = api.sinkhorn(logits, 20, 0.0, 'pallas')  # interpreted
  np.testing.assert_allclose(kernel, plain, atol=1e-6)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'reason'),
  [
    ((5, 4, 96), jnp.float32, 'width 96: the kernels take multiples of 128'),
    ((5, 5, 128), jnp.float32, r'5 streams: the kernels take \(2, 3, 4, 8\)'),
    ((5, 4, 128), jnp.float16, 'float16 streams: bfloat16 or float32'),
    ((5, 8, 2**17), jnp.float32, 'MiB of vector memory, there are 64 MiB'),
  ],
)
def test_what_the_kernels_cannot_serve(shape, dtype, reason, monkeypatch):
  """Named: an error with the reason. Not named: plain JAX, logged once."""
  num_tokens, n, dim = shape
  x, y = jnp.ones(shape, dtype), jnp.ones((num_tokens, dim), dtype)
  post, res = jnp.ones((n, num_tokens)), jnp.ones((n, n, num_tokens))
  with pytest.raises(NotImplementedError, match=reason):
    api.post(x, y, post, res, 'pallas')
  monkeypatch.setitem(api._PREFERENCES, 'cpu', ('pallas', 'xla'))
  api._warn_once.cache_clear()
  messages = []
  monkeypatch.setattr(api.logging, 'warning', messages.append)
  for _ in range(2):
    out = api.post(x, y, post, res)
  assert out.shape == shape
  (message,) = messages
  assert re.search(reason, message)


def kernels_of(lowered):
  """What the compiler is given of each kernel."""
  return re.findall(
    r'@tpu_custom_call\(.*backend_config = "((?:[^"\\]|\\.)+)"',
    lowered.as_text(),
  )


@pytest.mark.parametrize(
  ('generation', 'dim', 'dtype'),
  [
    ('v5p', shapes.PAPER[2], jnp.bfloat16),
    *(
      pytest.param(generation, dim, dtype, marks=pytest.mark.slow)
      for generation in ('v5p', 'v6e')
      for dim in shapes.PAPER[:2]
      for dtype in (jnp.bfloat16, jnp.float32)
    ),
  ],
)
def test_the_kernels_compile_for_tpus(generation, dim, dtype):
  """All, both ways, and within the memory that `launch.memory` gives them."""
  for operation in kernel_cost.OPERATIONS:
    forward, both = kernel_cost.programs(
      operation, kernel_cost.case(operation, dim, dtype=dtype), generation, None
    )
    # The kernel is the same without a gradient, and is compiled once.
    (alone,) = kernels_of(forward)
    assert alone in kernels_of(both)
    assert both.compile().as_text().count('tpu_custom_call') == 2


def test_bytes_through_memory():
  """The streams once: (2 n + 2) C a token forward, (3 n + 3) C backward."""
  sizes = specs.make_sizes(4, 2560, 24, True, jnp.dtype(jnp.bfloat16))
  for make, elements in (
    (specs.forward, (2 * 4 + 2) * 2560),
    (specs.backward, (3 * 4 + 3) * 2560),
  ):
    call = make(sizes)
    assert kernel_cost.elements_per_token(call) == elements
    # Coefficients, phi and its gradient are what is left.
    assert launch.moved(call, 4096) < 1.03 * 2 * elements * 4096


def test_tiles_are_as_large_as_the_vector_memory_allows():
  sizes = specs.make_sizes(4, 7168, 24, True, jnp.dtype(jnp.bfloat16))
  large, small = (
    launch.largest(specs.backward, sizes, 4096, chips.CHIPS[name])
    for name in ('v6e', 'v5p')
  )
  assert (large.sizes.tokens, small.sizes.tokens) == (128, 64)
  limit = chips.CHIPS['v5p'].vector_memory
  assert launch.memory(small) <= limit < launch.memory(large)


def test_bundles_of_nested_loops():
  text = """
     0   :  { %a = smov 0 }
   0x1 LB: > { %b = sadd.s32 1, %a }
   0x2 LB: >> { %c = vld [vmem:[%b]] }
   0x3   : >> { %p = scmp.ge.s32.totalorder %s1, 5 /* loop exit test */ }
   0x4   : > { %d = vadd.f32 %c, %c }
   0x5   : > { %q = scmp.ge.s32.totalorder %s2, 10 /* loop exit test */ }
   0x6   :  { %e = smov 0 }
  """
  assert bundles.count_bundles(text) == 3 + 5 * 2


ATTENTION = {'attention_forward': 2, 'attention_backward': 1}


def test_a_training_step_for_a_tpu_calls_the_kernels(optax_promotion):
  """Under scan, remat and shard_map: each once a site."""
  settings = config.Config(
    num_steps=40,
    model=config.ModelConfig(
      num_blocks=2,
      dim=128,
      ffn_dim=128,
      dtype='bfloat16',
      recompute='mhc',
      connection=config.ConnectionConfig(sinkhorn_iters=3),
      attention=config.AttentionConfig(
        num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
      ),
    ),
    data=config.DataConfig(seq_len=128, batch_size=4),
  )
  mesh = mesh_lib.make_mesh(
    settings.mesh, settings.data, targets.devices('v5e:2x2')
  )
  lowered = step.Step(Placement(settings, mesh)).lower()
  text = lowered.as_text()
  # A block has two sites: forward, recomputed, backward. The projection of a
  # block's last sub-layer is handed on, and not computed again. Of attention's
  # forward calls the second has no readers, which the compiler drops.
  calls = collections.Counter(re.findall(r'kernel_name = "(\w+)"', text))
  assert calls == {
    'advance_forward': 4,
    'advance_backward': 2,
    'sinkhorn_forward': 3,
    'sinkhorn_backward': 2,
    'collapse_forward': 1,
    'collapse_backward': 1,
    **ATTENTION,
  }
  residual = dataclasses.replace(
    settings.model, connection=config.ConnectionConfig(kind='residual')
  )
  settings = dataclasses.replace(settings, model=residual)
  plain = step.Step(Placement(settings, mesh)).lower()
  calls = re.findall(r'kernel_name = "(\w+)"', plain.as_text())
  assert collections.Counter(calls) == ATTENTION
