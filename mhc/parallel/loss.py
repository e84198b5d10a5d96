"""The loss and what is summed over devices, inside the one `shard_map`.

`jax.shard_map` is manual over the whole mesh: inside, a batch is the local one
and sums over devices are written out. `replicated` takes a device's rows
through the whole network, `pipelined` through the stages of a pipeline; both
have these functions of a `Placement` p and of the device's parts:

    loss_and_grads(p, params, router_bias, tokens)   tokens int32 [b, t + 1]
      the mean loss of the whole batch; its gradient; and of every expert layer,
      in the order of the pipeline, load [l, e] and the fraction of dropped
      assignments [l], None without experts
    token_losses(p, params, router_bias, tokens)     tokens int32 [b, t + 1]
      the summed loss of every row, [b]
    are_likeliest(p, params, router_bias, tokens)    tokens int32 [b, t + 1]
      whether each target's logit is the largest, 1 or 0, [b, t]
    stream_stats(p, params, router_bias, tokens)     tokens int32 [b, t]
      `residual.StreamStats` [l, 2, b t, ...] of the blocks that a pipeline is
      cut from, in its order, and of those before; None if there are none

The tokens of `stream_stats` are the same on every device, and any number of
rows; those of the others are a device's share of a batch.

Every argument is cast to vary over the mesh: the local gradient comes first,
then one sum over devices, where autodiff would sum at every use of a parameter.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from mhc import axes
from mhc import precision
from mhc.axes import AXES, DATA, EXPERT, PIPE
from mhc.model import parts


@parts.part(parts.HEAD)
def nats_of_rows(logits, targets):
  """The summed negative log-likelihood of each row's targets, float32 [b].

  Targets below 0 are not predicted.
  """
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(targets, 0)
  )
  nats = jnp.where(targets >= 0, nats, 0)
  return precision.mark('loss', jnp.sum(nats, axis=1))


def are_likeliest(logits, targets):
  """Whether each target's logit is the largest: 1 or 0, float32 [b, t]."""
  own = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=2)
  return (own[..., 0] >= jnp.max(logits, axis=2)).astype(jnp.float32)


def balance_loss(p, stats, num_rows):
  """The term that a microbatch adds to the summed loss."""
  weight = p.config.model.moe.balance_loss
  if not weight:
    return jnp.zeros((), jnp.float32)
  weight *= num_rows * p.config.data.targets_per_row
  return weight * jnp.sum(stats.balance_loss)


def over_devices(p, nats, grads, stats):
  """Means from a device's sums; the gradients are summed already."""
  data = p.config.data
  scale = 1 / (data.batch_size * data.targets_per_row)
  grads = jax.tree.map(functools.partial(jnp.multiply, scale), grads)
  load = None
  if stats is not None:
    over = (DATA, EXPERT)
    stats = axes.cast_varying_everywhere(stats)
    load = (
      jax.lax.psum(stats.load, over),
      jax.lax.pmean(stats.dropped, over) / p.num_microbatches,
    )
    if not p.is_pipelined:
      load = agreed(load, (PIPE,))
  return jax.lax.psum(nats, AXES) * scale, grads, load


def agreed(tree, over):
  """A value that all devices along those axes agree on, as one."""
  return jax.tree.map(functools.partial(jax.lax.pmean, axis_name=over), tree)
