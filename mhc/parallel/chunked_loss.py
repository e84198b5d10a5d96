"""Cross entropy of many tokens and a large vocabulary, chunk by chunk.

With z_i the logits of a token,

    nats = log sum_i exp(z_i) - z_target,
    d nats / d z_i = exp(z_i) / sum_j exp(z_j) - [i = target].

Of s tokens only s / c have logits at a time. The gradient of a sum over tokens
is computed along with it, chunk by chunk too, and the backward pass has but to
scale it: no logits are kept or computed again. The matrix' gradient is summed
over chunks in float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import axes
from mhc import precision
from mhc.model import layers
from mhc.model import parts

# Bytes of logits at a time, float32: what is less is not cut.
AT_A_TIME = 1 << 29


def num_chunks(num_tokens: int, vocab_size: int) -> int:
  """The least number whose chunks have `AT_A_TIME` or less, or a token each."""
  least = math.ceil(4 * num_tokens * vocab_size / AT_A_TIME)
  return max(1, min(least, num_tokens))


@parts.part(parts.HEAD)
def nats_of_rows(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 'b t'],
  chunks: int,
) -> Float[Array, 'b']:
  """`loss.nats_of_rows`, of s = b t hidden states."""
  nats = _nats(h, weight, targets.reshape(-1), chunks)
  return precision.mark('loss', jnp.sum(nats.reshape(targets.shape), axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def total_nats(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 'b t'],
  chunks: int,
) -> Float[Array, '']:
  """The sum of `nats_of_rows`, whose gradient is computed along with it."""
  return jnp.sum(nats_of_rows(h, weight, targets, chunks))


@parts.part(parts.HEAD)
def _forward(h, weight, targets, chunks):
  over = axes.varying_axes((h, weight, targets))
  wide = jnp.promote_types(h.dtype, jnp.float32)
  d_weight, (nats, d_h) = jax.lax.scan(
    functools.partial(_chunk, weight),
    axes.cast_varying(jnp.zeros(weight.shape, wide), over),
    _cut(h, targets.reshape(-1), chunks),
  )
  total = precision.mark('loss', jnp.sum(nats))
  return total, (_joined(d_h, len(h)), d_weight.astype(weight.dtype))


def _chunk(weight, d_weight, operands):
  """Adds the gradient of a chunk's matrix; its nats, and its own gradient."""
  h, targets = operands
  logits = _logits(h, weight)
  nats, log_sum = _nats_and_logarithm(logits, targets)
  hit = jnp.arange(weight.shape[1])[None] == targets[:, None]
  q = jnp.exp(logits - log_sum[:, None]) - hit.astype(logits.dtype)
  q = jnp.where(targets[:, None] >= 0, q, 0).astype(h.dtype)
  d_weight += jnp.matmul(h.T, q, preferred_element_type=d_weight.dtype)
  return d_weight, (nats, q @ weight.astype(h.dtype).T)


@parts.part(parts.HEAD)
def _backward(chunks, kept, g):
  del chunks
  return *((g * x.astype(g.dtype)).astype(x.dtype) for x in kept), None


total_nats.defvjp(_forward, _backward)


def _nats(h, weight, targets, chunks):
  """-log p(target) of every token, float32; 0 of targets below 0."""
  of_chunk = functools.partial(_nats_of_chunk, weight)
  return _joined(jax.lax.map(of_chunk, _cut(h, targets, chunks)), len(h))


def _nats_of_chunk(weight, operands):
  h, targets = operands
  return _nats_and_logarithm(_logits(h, weight), targets)[0]


def _nats_and_logarithm(logits, targets):
  log_sum = jax.nn.logsumexp(logits, axis=1)
  own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)
  return jnp.where(targets >= 0, log_sum - own[:, 0], 0), log_sum


def _logits(h, weight):
  return precision.mark('logits', layers.logits(h, weight))


def _cut(h, targets, chunks):
  """[s, ...] -> [c, s / c, ...]; a remainder is filled with no targets."""
  missing = -len(h) % chunks
  h = jnp.pad(h, ((0, missing), (0, 0)))
  targets = jnp.pad(targets, (0, missing), constant_values=-1)
  return h.reshape(chunks, -1, h.shape[1]), targets.reshape(chunks, -1)


def _joined(x, size):
  """[c, s / c, ...] -> [s, ...], without what was filled in."""
  return x.reshape(-1, *x.shape[2:])[:size]
