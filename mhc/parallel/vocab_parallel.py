"""Cross entropy of a vocabulary that is split over the devices of a pipeline.

Each device multiplies the hidden states with its columns W_p of the logits'
matrix. With z_i the logit of token i, of whichever device,

    nats = log sum_i exp(z_i - m) + m - z_target,      m = max_i z_i,

where the maximum and the sums are taken over columns, then over devices. For
the gradient, q_i = exp(z_i) / sum_j exp(z_j) - [i = target], of the device's
own columns:

    dW_p = h^T q_p,      dh = sum_p q_p W_p^T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import axes
from mhc.axes import PIPE
from mhc.model import layers
from mhc.model import parts


def nats_of_rows(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 'b t'],
) -> Float[Array, 'b']:
  """`loss.nats_of_rows`, of s = b t hidden states."""
  nats = cross_entropy(h, weight, targets.reshape(-1)).reshape(targets.shape)
  return jnp.sum(jnp.where(targets >= 0, nats, 0), axis=1)


def are_likeliest(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 'b t'],
) -> Float[Array, 'b t']:
  """`loss.are_likeliest`, of s = b t hidden states."""
  logits = layers.logits(h, weight)
  top = jax.lax.pmax(jnp.max(logits, axis=1), PIPE)
  own = _of_targets(logits, targets.reshape(-1))
  found = jax.lax.psum(own, PIPE) >= top
  found = found.astype(jnp.float32).reshape(targets.shape)
  return axes.cast_varying(found, axes.varying_axes((h, weight, targets)))


@jax.custom_vjp
def cross_entropy(
  h: Float[Array, 's d'],
  weight: Float[Array, 'd v'],
  targets: Int[Array, 's'],
) -> Float[Array, 's']:
  """-log p(target) of every token, float32, the same on all devices.

  Args:
    h: hidden states, the same on all devices of the axis PIPE.
    weight: the device's columns, v of v p; cast to the dtype of h.
    targets: numbers in the whole vocabulary, or below 0.
  """
  return _forward(h, weight, targets)[0]


@parts.part(parts.HEAD)
def _forward(h, weight, targets):
  logits = layers.logits(h, weight)
  top = jax.lax.pmax(jnp.max(logits, axis=1), PIPE)
  total = jnp.sum(jnp.exp(logits - top[:, None]), axis=1)
  total, value = jax.lax.psum((total, _of_targets(logits, targets)), PIPE)
  nats = jnp.log(total) + top - value
  over = axes.varying_axes((h, weight, targets))
  kept = axes.cast_varying((top, total), over)
  return axes.cast_varying(nats, over), (h, weight, targets, logits, *kept)


@parts.part(parts.HEAD)
def _backward(kept, g):
  h, weight, targets, logits, top, total = kept
  share = jnp.exp(logits - top[:, None]) / total[:, None]
  column, here = _columns(targets, weight.shape[1])
  is_target = jnp.arange(weight.shape[1])[None] == column[:, None]
  hit = (is_target & here[:, None]).astype(share.dtype)
  q = ((share - hit) * g[:, None]).astype(h.dtype)
  dh = jax.lax.psum(q @ weight.astype(h.dtype).T, PIPE)
  return (
    axes.cast_varying(dh, axes.varying_axes(h)),
    (h.T @ q).astype(weight.dtype),
    None,
  )


cross_entropy.defvjp(_forward, _backward)


def _of_targets(logits, targets):
  """The logits of targets that are on this device, 0 of others, [s]."""
  column, here = _columns(targets, logits.shape[1])
  value = jnp.take_along_axis(logits, column[:, None], axis=1)[:, 0]
  return jnp.where(here, value, 0)


def _columns(targets, size):
  """The targets' columns on this device, and whether they are here."""
  column = targets - jax.lax.axis_index(PIPE) * size
  here = (column >= 0) & (column < size)
  return jnp.clip(column, 0, size - 1), here
