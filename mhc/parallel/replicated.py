"""A device's rows through the whole network, microbatch by microbatch.

Each block's matrices are put together when the network comes to it (`fsdp`).
The functions are described in `loss`.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from mhc import axes
from mhc.axes import AXES, DATA, PIPE
from mhc.model import parts
from mhc.parallel import chunked_loss
from mhc.parallel import fsdp
from mhc.parallel import loss
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition


def loss_and_grads(p, params, router_bias, tokens):
  params, router_bias, tokens = axes.cast_varying_everywhere(
    (params, router_bias, tokens)
  )
  gradient = jax.grad(functools.partial(_objective, p), has_aux=True)
  microbatches = mesh_lib.microbatches(tokens, p.config.data)
  if len(microbatches) == 1:
    total = gradient(params, router_bias, tokens)
  else:

    def add(total, part):
      one = gradient(params, router_bias, part)
      with parts.part(parts.ACCUMULATION):
        return jax.tree.map(jnp.add, total, one), None

    zeros = jax.tree.map(
      jnp.zeros_like,
      jax.eval_shape(gradient, params, router_bias, microbatches[0]),
    )
    zeros = axes.cast_varying_everywhere(zeros)
    with parts.part(parts.BUFFERS):
      total, _ = jax.lax.scan(add, zeros, microbatches)
  grads, (nats, stats) = total
  grads = jax.tree.map(fsdp.psum_replicated, grads, p.param_specs)
  return loss.over_devices(p, nats, grads, stats)


def token_losses(p, params, router_bias, tokens):
  return _scored(_nats_of_rows, p, params, router_bias, tokens)


def are_likeliest(p, params, router_bias, tokens):
  return _scored(_are_likeliest, p, params, router_bias, tokens)


def stream_stats(p, params, router_bias, tokens):
  params, router_bias, tokens = axes.cast_varying_everywhere(
    (params, router_bias, tokens)
  )
  model, gather_block = _network(p, params)
  found = model.stream_stats(tokens, router_bias, gather_block=gather_block)
  return loss.agreed(found, AXES), None


def _objective(p, params, router_bias, tokens):
  """The sum over local tokens, and beside it nats and the experts' loads."""
  model, hidden = _forward(p, params)
  h, stats = hidden(tokens[:, :-1], router_bias)
  total = nats = _total_nats(model, h, tokens[:, 1:])
  if stats is not None:
    total += loss.balance_loss(p, stats, len(tokens))
  return total, (nats, stats)


def _total_nats(model, h, targets):
  chunks = chunked_loss.num_chunks(targets.size, model.config.vocab_size)
  if chunks == 1:
    return jnp.sum(_nats_of_rows(model, h, targets))
  return chunked_loss.total_nats(h, model.head_weight(), targets, chunks)


def _nats_of_rows(model, h, targets):
  chunks = chunked_loss.num_chunks(targets.size, model.config.vocab_size)
  if chunks == 1:
    return loss.nats_of_rows(model.logits(h, targets.shape), targets)
  return chunked_loss.nats_of_rows(h, model.head_weight(), targets, chunks)


def _are_likeliest(model, h, targets):
  return loss.are_likeliest(model.logits(h, targets.shape), targets)


def _scored(score, p, params, router_bias, tokens):
  """A score of hidden states and targets, of every row."""
  params, router_bias, tokens = axes.cast_varying_everywhere(
    (params, router_bias, tokens)
  )

  def score_rows(rows):
    model, hidden = _forward(p, params)
    h, _ = hidden(rows[:, :-1], router_bias)
    return score(model, h, rows[:, 1:])

  microbatches = mesh_lib.microbatches(tokens, p.config.data)
  if len(microbatches) == 1:
    return loss.agreed(score_rows(tokens), (PIPE,))
  scores = jax.lax.map(score_rows, microbatches)
  return loss.agreed(scores.reshape(-1, *scores.shape[2:]), (PIPE,))


def _forward(p, params):
  """The network with the device's parameters, and its `hidden_and_stats`."""
  model, gather_block = _network(p, params)
  return model, functools.partial(
    model.hidden_and_stats,
    num_sub_batches=p.config.mesh.num_sub_batches,
    gather_block=gather_block,
  )


def _network(p, params):
  """The network, and how its blocks are put together."""
  if jax.lax.axis_size(DATA) == 1:
    return p.merge(params), None
  stacks = {k: v for k, v in params.items() if k.endswith('_blocks')}
  others = {k: v for k, v in params.items() if k not in stacks}
  around = {k: p.param_specs[k] for k in others}
  others = fsdp.gather(others, around, p.config.model.dtype)
  return p.merge(stacks | others), functools.partial(_gather_block, p)


def _gather_block(p, name, block):
  graphdef, params = nnx.split(block)
  specs = jax.tree.map(_of_one_block, p.param_specs[name])
  params = fsdp.gather(
    nnx.to_pure_dict(params), specs, p.config.model.dtype, above=(name,)
  )
  return nnx.merge(graphdef, nnx.State(params))


def _of_one_block(spec):
  """The scan over blocks has taken the first dimension away."""
  return partition.PartitionSpec(*spec[1:])
