"""Causal softmax attention.

    o_t = sum_s a_ts v_s,   a_ts = softmax_s(scale q_t . k_s),   s <= start + t

with the softmax in float32. Whole rows go through a kernel that keeps no
logits, on TPUs our own (`mhc.kernels.pallas.attention`), on NVIDIA GPUs that of
cuDNN. Elsewhere, in decoding, and for sizes that the kernels do not take,
blocks of `BLOCK` queries are taken one by one, each against the keys that it
can see, and are computed again for the gradient: at most [BLOCK, s] logits a
head exist at a time, and most of the products beyond the diagonal are never
made.

(`jax.nn.dot_product_attention` makes all of [t, s] on every backend but cuDNN;
Splash attention does not trace in a `shard_map` that checks its axes.)
"""

import functools
from typing import Literal

from absl import logging
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import precision
from mhc.kernels import platform as platform_lib
from mhc.model import parts
from mhc.model import recompute

BLOCK = 1024


@parts.part(parts.ATTENTION)
def causal_attention(
  query: Float[Array, 'b t h k'],
  key: Float[Array, 'b s g k'] | Float[Array, 'b s k'],
  value: Float[Array, 'b s g v'] | Float[Array, 'b s v'],
  scale: float,
  start: int | Int[Array, ''] = 0,
  implementation: Literal['auto', 'xla'] = 'auto',
) -> Float[Array, 'b t h v']:
  """The weighted values, in the dtype of the values.

  Args:
    query: of t tokens, h heads each.
    key, value: of s tokens, g heads for h / g queries each; without a head
      dimension all heads share them, as they may the keys alone.
    scale: of the logits.
    start: position of the first query; key s stands at position s.
    implementation: 'auto' for a kernel where there is one, 'xla' for plain JAX.
  """
  whole = isinstance(start, int) and start == 0 and key.ndim == value.ndim == 4
  kernels = {'tpu': by_kernel, 'gpu': by_cudnn}
  attend = kernels.get(platform_lib.platform())
  whole = whole and key.shape[1] == query.shape[1]
  if whole and attend and implementation == 'auto':
    try:
      return attend(query, key, value, scale)
    except NotImplementedError as reason:
      _warn_once(f'attention runs without its kernel: {reason}')
  return in_blocks(query, key, value, scale, start)


def by_kernel(
  query: Float[Array, 'b t h k'],
  key: Float[Array, 'b t g k'],
  value: Float[Array, 'b t g v'],
  scale: float,
) -> Float[Array, 'b t h v']:
  """`causal_attention` of whole rows by the TPU kernels.

  Raises:
    NotImplementedError: they do not take these sizes.
  """
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  return jnp.swapaxes(_kernel(scale, query, key, value), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(scale, query, key, value):
  return _kernel_forward(scale, query, key, value)[0]


def _rows(x, heads):
  """[b, g, t, k] as [b h, t, k], each of g heads h / g times."""
  x = jnp.repeat(x, heads // x.shape[1], axis=1)
  return x.reshape(-1, *x.shape[2:])


def _summed(rows, like):
  """The transpose of `_rows`."""
  batch, groups, *rest = like.shape
  return jnp.sum(rows.reshape(batch, groups, -1, *rest), axis=2)


def _pallas():
  # Not with the module: Pallas takes longer to load than most of the rest.
  from mhc.kernels.pallas import attention

  return attention


def _kernel_forward(scale, query, key, value):
  rows = (_rows(x, query.shape[1]) for x in (query, key, value))
  out, log_sum = _pallas().forward(*rows, scale)
  # So that recomputation keeps both, and the kernel runs once.
  out, log_sum = recompute.name_inner(out), recompute.name_inner(log_sum)
  shape = *query.shape[:3], value.shape[-1]
  return out.reshape(shape), (query, key, value, out, log_sum)


def _kernel_backward(scale, kept, d_out):
  *inputs, out, log_sum = kept
  rows = (_rows(x, inputs[0].shape[1]) for x in inputs)
  found = _pallas().backward(
    *rows, out, log_sum, d_out.reshape(out.shape), scale
  )
  return tuple(map(_summed, found, inputs))


_kernel.defvjp(_kernel_forward, _kernel_backward)


def by_cudnn(
  query: Float[Array, 'b t h k'],
  key: Float[Array, 'b t g k'],
  value: Float[Array, 'b t g v'],
  scale: float,
) -> Float[Array, 'b t h v']:
  """`causal_attention` of whole rows by cuDNN, of 16-bit numbers.

  It wants values as wide as keys: those of latent attention are padded by
  zeros, which come out as zeros.

  Raises:
    NotImplementedError: it does not take these arrays, or is not there.
  """
  width = query.shape[-1] - value.shape[-1]
  if width < 0:
    raise NotImplementedError('cuDNN wants values at most as wide as keys')
  padded = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, width)))
  try:
    out = jax.nn.dot_product_attention(
      query, key, padded, scale=scale, is_causal=True, implementation='cudnn'
    )
  except (NotImplementedError, RuntimeError, ValueError) as reason:
    raise NotImplementedError(f'cuDNN: {reason}') from reason
  return out[..., : value.shape[-1]]


def in_blocks(
  query: Float[Array, 'b t h k'],
  key: Float[Array, 'b s g k'] | Float[Array, 'b s k'],
  value: Float[Array, 'b s g v'] | Float[Array, 'b s v'],
  scale: float,
  start: int | Int[Array, ''] = 0,
) -> Float[Array, 'b t h v']:
  """`causal_attention` in plain JAX."""
  time, blocks = query.shape[1], []
  for first in range(0, time, BLOCK):
    last = min(first + BLOCK, time)
    # With a traced start the mask alone says which keys are seen.
    seen = start + last if isinstance(start, int) else key.shape[1]
    block = recompute.checkpoint_cheap(_block, static_argnums=3)
    blocks.append(
      block(
        query[:, first:last],
        key[:, :seen],
        value[:, :seen],
        scale,
        start + first,
      )
    )
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _block(query, key, value, scale, start):
  shape = *query.shape[:3], value.shape[-1]
  heads, of_value = ('h' if x.ndim == 4 else '' for x in (key, value))
  if heads and key.shape[2] != query.shape[2]:  # heads of g groups
    heads, query = (
      'g',
      query.reshape(*shape[:2], key.shape[2], -1, key.shape[3]),
    )
  each = {'h': 'h', '': 'h', 'g': 'gh'}[heads]
  logits = jnp.einsum(
    f'bq{each}k,bs{heads}k->b{each}qs',
    query,
    key,
    preferred_element_type=jnp.float32,
  )
  logits = precision.mark('attention_logits', logits * scale)
  position = start + jnp.arange(query.shape[1])
  seen = jnp.arange(key.shape[1])[None] <= position[:, None]
  seen = jnp.expand_dims(seen, range(logits.ndim - 2))
  logits = jnp.where(seen, logits, -jnp.inf)
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  of_value = 'g' if heads == 'g' else of_value
  mixed = jnp.einsum(f'b{each}qs,bs{of_value}k->bq{each}k', weights, value)
  return mixed.reshape(shape)


def extended[Cache](cache: Cache, new: Cache, start: Int[Array, '']) -> Cache:
  """A decoding cache [b, s, ...] with new tokens from place `start` on."""
  return jax.tree.map(
    lambda old, one: jax.lax.dynamic_update_slice_in_dim(
      old, one, start, axis=1
    ),
    cache,
    new,
  )


@functools.cache
def _warn_once(message):
  logging.warning(message)
