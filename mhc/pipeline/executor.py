"""Runs a schedule of pipeline stages inside a `shard_map`.

Every device runs the same program, a scan over the ticks of a static table
(`table`), each tick (`ticks`) as follows.

    1. gradients that left a stage in the last tick arrive and are stored
    2. F: one stage forward for one microbatch, or nothing
    3. its output sets out for the next stage
    4. the head, where the vocabulary is split over the stages
    5. B: one stage's gradient for one microbatch, or nothing
    6. what set out in 3 is stored

F does not wait for the transfer of 1, nor B for that of 3: both travel while
something is computed. B computes its stage again from the stage's input, which
is all that is kept of a microbatch between F and B, and takes the gradient by
`jax.vjp` under the model's recompute policy; or F keeps more (`keeping`). The
first stage embeds its tokens again instead of keeping anything; the last has
its forward pass in B only, where F does not keep more.

Collectives over `PIPE` stand outside the branches: a device that is idle must
take part. Inside a branch there are only those over other axes, whose groups
take the same branch. Everything that enters a branch varies over all axes, so
that autodiff puts no sum over devices there.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc import axes
from mhc import config
from mhc.model import parts as names
from mhc.pipeline import buffers
from mhc.pipeline import keeping
from mhc.pipeline import table
from mhc.pipeline import ticks
from mhc.pipeline import units

Tree = Any


@runtime_checkable
class Stages(Protocol):
  """The functions of a pipeline; c rows of t tokens are a microbatch."""

  # Blocks in a recompute block.
  recompute_blocks: int

  def embed(self, shared, tokens):
    """Tokens int32 [c, t] -> state, what the first stage takes."""

  def enter(self, state):
    """State as it arrives -> as blocks take it."""

  def run(self, blocks, bias, is_real, state):
    """Blocks: state, what else they add to the objective, statistics.

    `blocks` [r, ...], `bias` [r, e] or None, `is_real` bool [r] or None: the
    rows of a stage, or some of them.
    """

  def leave(self, state):
    """State as blocks return it -> as it travels on."""

  def close(self, shared, state):
    """State -> h [c t, d], what the head takes."""

  def score(self, shared, h, targets):
    """The nats, float32 [c], of targets int32 [c, t]; or another score of each.

    With head='vocab' of a vocabulary that is split over PIPE: called by all
    devices at once.
    """


class Parts(NamedTuple):
  """The arrays of one device, inside a `shard_map`."""

  blocks: Tree  # its rows of the stack, [v r, ...], see `stage_layout`
  bias: Float[Array, 'vr e'] | None  # of the router, with experts
  is_real: Bool[Array, 'vr'] | None  # which rows are blocks; None for all
  shared: Tree  # every other parameter
  tokens: Int[Array, 'm c t1']  # t + 1 of a row, inputs and targets


@names.part(names.BUFFERS)
def gradients(
  schedule: table.Schedule,
  stages: Stages,
  parts: Parts,
  keep: config.Keep = 'inputs',
) -> ticks.Gradients:
  """The gradient of the summed loss of a device's microbatches.

  Args:
    schedule: for as many microbatches and the devices of the axis PIPE.
    stages: the functions.
    parts: what they are applied to.
    keep: what is kept of a stage from F to B, see `keeping`.
  """
  device = _Device(schedule, stages, parts)
  ticking = {
    'inputs': keeping.RecomputingTick,
    'stages': keeping.KeepingTick,
  }[keep]
  tick = ticking(schedule, device)
  total = jax.lax.scan(tick, tick.start(), buffers.table_rows(schedule))[0][-1]
  return total._replace(
    blocks=jax.tree.map(_by_layer, total.blocks),
    stats=jax.tree.map(_by_layer, total.stats),
  )


@names.part(names.BUFFERS)
def forward(
  schedule: table.Schedule, stages: Stages, parts: Parts
) -> tuple[Float[Array, 'm c *score'], Tree]:
  """The score of every row, and the statistics of the blocks.

  Args:
    schedule: of `table.build_forward`.
    stages, parts: as for `gradients`.

  Returns:
    scores, on every device of PIPE; and the statistics of `stages.run` of each
    microbatch at each block of this device, [v r, m, ...].
  """
  device = _Device(schedule, stages, parts)
  tick = ticks.ForwardTick(schedule, device)
  carry, _ = jax.lax.scan(tick, tick.start(), buffers.table_rows(schedule))
  _, hidden, stats = carry
  hidden = buffers.broadcast_from_last(hidden, schedule)
  score = functools.partial(_score, device, hidden)
  scores = jax.lax.map(score, jnp.arange(schedule.num_microbatches))
  return scores, jax.tree.map(_by_layer, stats)


class _Device:
  """The stages' functions on one device's parts, all varying over all axes."""

  def __init__(self, schedule, stages, parts):
    parts = axes.cast_varying_everywhere(parts)
    self.stages = stages
    stack = (parts.blocks, parts.bias, parts.is_real)
    self.stack = _by_chunk(stack, schedule.num_chunks)
    self.units = units.Units(stages, self.stack)
    self.shared = parts.shared
    self.tokens = parts.tokens
    self.state = jax.eval_shape(self.embed, self.shared, 0)
    self.hidden = jax.eval_shape(self.close, self.state)
    self.stats = jax.eval_shape(self.first_chunk, self.state)[2]

  def chunk(self, number):
    """A stage's blocks, biases and `is_real`."""
    return buffers.read_slot(self.stack, number)

  def first_chunk(self, state):
    return self.stage(*self.chunk(0), state)

  def stage(self, blocks, bias, is_real, state):
    """`stages.run` from what arrives to what travels on."""
    state = self.stages.enter(state)
    state, extra, stats = self.stages.run(blocks, bias, is_real, state)
    return self.stages.leave(state), extra, stats

  def embed(self, shared, index):
    tokens = buffers.index(self.tokens, index)
    return self.stages.embed(shared, tokens[:, :-1])

  def stage_input(self, my, op, x):
    """The input of the F or B at hand: x, or anew from tokens."""
    return ticks.cond(
      f'{op}_first',
      my[f'{op}_first'] == 1,
      self._embed_instead,
      ticks.keep,
      x,
      my[f'{op}_mb'],
    )

  def run(self, my, x):
    """The stage of the F at hand."""
    chunk = self.chunk(my['f_chunk'])
    return self.stage(*chunk, self.stage_input(my, 'f', x))

  def close(self, y):
    return self.stages.close(self.shared, y)

  def score(self, h, index):
    return self.nats(self.shared, h, index)

  def nats(self, shared, h, index):
    tokens = buffers.index(self.tokens, index)
    return self.stages.score(shared, h, tokens[:, 1:])

  def summed_nats(self, shared, h, index):
    return jnp.sum(self.nats(shared, h, index))

  def _embed_instead(self, x, index):
    del x
    return self.embed(self.shared, index)


def _score(device, hidden, index):
  """The score of a microbatch's rows."""
  return device.score(buffers.index(hidden, index), index)


def _by_chunk(tree, num_chunks):
  """[v r, ...] -> [v, r, ...]."""
  return jax.tree.map(
    lambda leaf: leaf.reshape(num_chunks, -1, *leaf.shape[1:]), tree
  )


def _by_layer(leaf):
  """[v, r, ...] -> [v r, ...]."""
  return leaf.reshape(-1, *leaf.shape[2:])
