"""The attention kernels against attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc.kernels import chips
from mhc.kernels.pallas import attention as kernel
from mhc.model import attention

SCALE = 0.17


def reference(q, k, v):
  """softmax(scale q k^T) v over the keys up to each query, [b, t, h, ...]."""
  logits = SCALE * jnp.einsum('bqhk,bshk->bhqs', q, k)
  seen = jnp.tril(jnp.ones(logits.shape[2:], bool))
  weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
  return jnp.einsum('bhqs,bshv->bqhv', weights, v)


@functools.partial(jax.jit, static_argnums=0)
def both(function, q, k, v, cotangent):
  """The result and the gradients of q, k and v."""
  out, pull = jax.vjp(function, q, k, v)
  return [out, *pull(cotangent.astype(out.dtype))]


@pytest.mark.parametrize(
  ('tokens', 'keys', 'values', 'dtype'),
  [
    (128, 192, 128, jnp.float32),
    (128, 192, 128, jnp.bfloat16),
    (77, 48, 32, jnp.float32),
    (1000, 48, 32, jnp.bfloat16),
    (3072, 16, 8, jnp.float32),
  ],
)
def test_against_float64(tokens, keys, values, dtype):
  draw = np.random.default_rng(0).normal
  sizes = keys, keys, values, values
  given = [jnp.asarray(draw(size=(1, tokens, 2, one)), dtype) for one in sizes]
  found = both(functools.partial(attention.by_kernel, scale=SCALE), *given)
  with jax.enable_x64(True):
    exact = both(reference, *(x.astype(jnp.float64) for x in given))
  # Each product rounds what it is given to the dtype.
  bound = 2e-5 if dtype == jnp.float32 else 2e-2
  for name, one, right in zip('oqkv', found, exact, strict=True):
    assert one.dtype == dtype
    error = np.abs(np.asarray(one, np.float64) - np.asarray(right))
    assert error.max() <= bound * np.abs(right).max(), name


def test_no_tile_above_the_diagonal():
  tiles = np.asarray(kernel._tiles(3, by_key=True))
  assert tiles.tolist() == [[0, 1, 2, 1, 2, 2], [0, 0, 0, 1, 1, 2]]
  by_query = np.asarray(kernel._tiles(3, by_key=False))
  assert by_query.tolist() == [[0, 1, 1, 2, 2, 2], [0, 0, 1, 0, 1, 2]]


def sizes_of(chip, tokens, keys=192, values=128):
  shape = (2, tokens, keys)
  return kernel.make_sizes(
    shape, values, jnp.dtype('bfloat16'), chips.CHIPS[chip]
  )


@pytest.mark.parametrize(
  ('chip', 'tokens', 'block'),
  [
    *[(name, 4096, 1024) for name in ('v5e', 'v5p', 'v6e', 'tpu7x')],
    ('v4', 4096, 256),
    ('v6e', 32768, 1024),
    ('v5p', 1000, 512),
    ('v5p', 1200, 256),
    ('v5p', 100, 128),
  ],
)
def test_tiles_fit(chip, tokens, block):
  sizes = sizes_of(chip, tokens)
  assert sizes.block == block
  assert kernel.memory(sizes) <= chips.CHIPS[chip].vector_memory
  assert tokens <= sizes.tokens < tokens + block


def test_what_does_not_fit_is_refused():
  with pytest.raises(NotImplementedError, match=r'131072 tokens.*there are 64'):
    sizes_of('v5p', 2**17)
  with pytest.raises(NotImplementedError, match='heads of 12 and 8'):
    sizes_of('v5p', 128, 12, 8)
