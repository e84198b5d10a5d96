"""A device's rows through the stages of a pipeline.

Matrices are put together once a step, before the first microbatch, for the
blocks of the device's own stages. The functions are described in `loss`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from mhc import axes
from mhc.axes import AXES, DATA, EXPERT, PIPE
from mhc.model import recompute
from mhc.parallel import fsdp
from mhc.parallel import loss
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import placement
from mhc.parallel import vocab_parallel
from mhc.pipeline import executor
from mhc.pipeline import table


def loss_and_grads(p, params, router_bias, tokens):
  microbatches = mesh_lib.microbatches(tokens, p.config.data)
  stages, parts = _cut(p, params, router_bias, microbatches)
  schedule = table.for_mesh(p.config.mesh, len(microbatches))
  sums = executor.gradients(schedule, stages, parts, p.config.mesh.keep)
  grads = sums.shared | {p.config.model.stack: sums.blocks}
  grads = fsdp.scatter(grads, p.param_specs)
  return loss.over_devices(p, sums.nats, grads, sums.stats)


def token_losses(p, params, router_bias, tokens):
  return _scored('nats_of_rows', p, params, router_bias, tokens)


def are_likeliest(p, params, router_bias, tokens):
  return _scored('are_likeliest', p, params, router_bias, tokens)


def stream_stats(p, params, router_bias, tokens):
  # Nothing is predicted from the last token.
  padded = jnp.pad(tokens, ((0, 0), (0, 1)))[None]
  stages, parts = _cut(p, params, router_bias, padded, collect=True)
  before = stages.stream_stats_before(parts.shared, parts.tokens[0, :, :-1])
  if before is not None:
    before = loss.agreed(before, AXES)
  _, stack = executor.forward(_forward_schedule(p, 1), stages, parts)
  stack = jax.tree.map(_first_microbatch, stack)
  return loss.agreed(stack, (DATA, EXPERT)), before


@dataclasses.dataclass(frozen=True)
class Stages:
  """The network's functions, for `executor`; c rows of t tokens at a time."""

  p: placement.Placement
  batch: tuple[int, int]  # (c, t)
  shared: placement.Params  # this device's, for what does not look at them
  blocks: placement.Params
  collect: bool = False  # statistics of the streams, not of experts
  # What `score` is, of `loss` or `vocab_parallel`.
  scores: Literal['nats_of_rows', 'are_likeliest'] = 'nats_of_rows'

  def embed(self, shared, tokens):
    return self._network(shared, self.blocks).embed_and_expand(
      tokens, num_sub_batches=self._num_sub_batches
    )[0]

  def enter(self, state):
    return self._network(self.shared, self.blocks).enter_stage(state)

  def run(self, blocks, bias, is_real, state):
    state, aux = self._network(self.shared, blocks).run_blocks(
      state, self.batch, bias, is_real, collect=self.collect
    )
    extra = jnp.zeros((), jnp.float32)
    if aux.moe_stats is not None:
      extra = loss.balance_loss(self.p, aux.moe_stats, self.batch[0])
    extra = axes.cast_varying(extra, axes.varying_axes(state))
    return state, extra, aux.stream_stats if self.collect else aux.moe_stats

  def leave(self, state):
    return self._network(self.shared, self.blocks).leave_stage(state)

  def close(self, shared, state):
    return self._network(shared, self.blocks).collapse_and_norm(state)

  def score(self, shared, h, targets):
    if self.p.config.mesh.head == 'vocab':
      score = getattr(vocab_parallel, self.scores)
      return score(h, self._head_columns(shared), targets)
    logits = self._network(shared, self.blocks).logits(h, targets.shape)
    return getattr(loss, self.scores)(logits, targets)

  def _head_columns(self, shared):
    """This device's columns of the matrix of the logits."""
    if not self.p.config.model.tied_embeddings:
      return shared['head']['weight']
    table = shared['embed']['table']
    size = len(table) // jax.lax.axis_size(PIPE)
    first = jax.lax.axis_index(PIPE) * size
    return jax.lax.dynamic_slice_in_dim(table, first, size).T

  def stream_stats_before(self, shared, tokens):
    """Those of the blocks before the first stage's; None if there are none."""
    network = self._network(shared, self.blocks)
    aux = network.embed_and_expand(tokens, collect=True)[1]
    return None if aux is None else aux.stream_stats

  @property
  def recompute_blocks(self):
    rows = self.p.layout.layers_per_stage
    return recompute.recompute_interval(self.p.config.model, rows) // 2

  @property
  def _num_sub_batches(self):
    return 1 if self.collect else self.p.config.mesh.num_sub_batches

  def _network(self, shared, blocks):
    return self.p.merge(shared | {self.p.config.model.stack: blocks})


def _scored(scores, p, params, router_bias, tokens):
  """A score of every row."""
  microbatches = mesh_lib.microbatches(tokens, p.config.data)
  stages, parts = _cut(p, params, router_bias, microbatches)
  stages = dataclasses.replace(stages, scores=scores)
  schedule = _forward_schedule(p, len(microbatches))
  found, _ = executor.forward(schedule, stages, parts)
  return loss.agreed(found.reshape(-1, *found.shape[2:]), (PIPE,))


def _cut(p, params, router_bias, microbatches, collect=False):
  """Stages and parts of this device, its matrices put together."""
  params, router_bias, microbatches = axes.cast_varying_everywhere(
    (params, router_bias, microbatches)
  )
  params = fsdp.gather(params, p.param_specs, p.config.model.dtype)
  blocks = params.pop(p.config.model.stack)
  _, num_rows, length = microbatches.shape
  stages = Stages(p, (num_rows, length - 1), params, blocks, collect)
  parts = executor.Parts(
    blocks, router_bias, _is_real(p.layout), params, microbatches
  )
  return stages, parts


def _is_real(layout):
  """Which of this device's rows are blocks; None for all."""
  real = layout.depth_index >= 0
  if real.all():
    return None
  by_device = jnp.asarray(real).reshape(layout.num_devices, -1)
  return by_device[jax.lax.axis_index(PIPE)]


def _forward_schedule(p, num_microbatches):
  layout = p.layout
  size = (layout.placement, layout.num_devices, layout.num_chunks)
  return table.build_forward(*size, num_microbatches)


def _first_microbatch(stats):
  """[l, m, ...] -> [l, ...]."""
  return stats[:, 0]
