"""Cross entropy of many tokens and a large vocabulary, chunk by chunk.

With z_i the logits of a token,

    nats = log sum_i exp(z_i) - z_target,
    d nats / d z_i = exp(z_i) / sum_j exp(z_j) - [i = target].

Of s tokens only s / c have logits at a time, in the backward pass as in the
forward pass: it computes them again, a third of the head's work more. What is
kept of a token is the logarithm. The gradient of the matrix is summed over
chunks in float32.
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
  """The least divisor of `num_tokens` whose chunks have `AT_A_TIME` or less."""
  least = math.ceil(4 * num_tokens * vocab_size / AT_A_TIME)
  return next(
    (c for c in range(max(1, least), num_tokens) if num_tokens % c == 0),
    num_tokens,
  )


@parts.part(parts.HEAD)
def nats_of_rows(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 'b t'],
  chunks: int,
) -> Float[Array, 'b']:
  """`loss.nats_of_rows`, of s = b t hidden states, in a divisor of s chunks."""
  nats = cross_entropy(h, weight, targets.reshape(-1), chunks)
  nats = jnp.where(targets >= 0, nats.reshape(targets.shape), 0)
  return precision.mark('loss', jnp.sum(nats, axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 's'],
  chunks: int,
) -> Float[Array, 's']:
  """-log p(target) of every token, float32; of targets below 0 anything."""
  return _forward(h, weight, targets, chunks)[0]


@parts.part(parts.HEAD)
def _forward(h, weight, targets, chunks):
  nats, log_sum = jax.lax.map(
    functools.partial(_nats_of_chunk, weight), _cut(chunks, h, targets)
  )
  return nats.reshape(-1), (h, weight, targets, log_sum.reshape(-1))


def _nats_of_chunk(weight, operands):
  h, targets = operands
  logits = _logits(h, weight)
  log_sum = jax.nn.logsumexp(logits, axis=1)
  own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)
  return log_sum - own[:, 0], log_sum


@parts.part(parts.HEAD)
def _backward(chunks, kept, g):
  h, weight, targets, log_sum = kept
  zero = jnp.zeros(weight.shape, log_sum.dtype)
  d_weight, d_h = jax.lax.scan(
    functools.partial(_pull_back_chunk, weight),
    axes.cast_varying(zero, axes.varying_axes((h, weight, targets, g))),
    _cut(chunks, h, targets, log_sum, g),
  )
  return d_h.reshape(h.shape), d_weight.astype(weight.dtype), None


def _pull_back_chunk(weight, d_weight, operands):
  h, targets, log_sum, g = operands
  share = jnp.exp(_logits(h, weight) - log_sum[:, None])
  hit = jnp.arange(weight.shape[1])[None] == targets[:, None]
  q = ((share - hit.astype(share.dtype)) * g[:, None]).astype(h.dtype)
  d_weight += jnp.matmul(h.T, q, preferred_element_type=d_weight.dtype)
  return d_weight, q @ weight.astype(h.dtype).T


cross_entropy.defvjp(_forward, _backward)


def _logits(h, weight):
  return precision.mark('logits', layers.logits(h, weight))


def _cut(chunks, *arrays):
  """[s, ...] -> [c, s / c, ...]."""
  return tuple(x.reshape(chunks, -1, *x.shape[1:]) for x in arrays)
