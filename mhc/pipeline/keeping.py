"""Stages that are kept: F saves what its gradient needs, B only pulls back.

`ticks.TrainingTick` computes a stage again in B from its input. Here what
`jax.vjp` keeps of F goes to a slot of the schedule until B: everything but the
weights, which are there anyway. That saves a forward pass a stage and costs
memory, `num_kept_slots` times what one stage keeps.

A stage goes unit by unit, each a recompute block, so that every array is moved
once: a unit's weights are sliced from the stack, what it keeps is written to
its place in the slot, and its gradient is added to its place in the sum.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mhc import axes
from mhc.model import parts
from mhc.pipeline import buffers
from mhc.pipeline import ticks


class Kept(NamedTuple):
  """What F keeps of stages, or of one: lists of arrays.

  Attributes:
    units: [slots, units, ...] of each unit of blocks.
    ends: [slots, ...] of where the stage begins and ends.
  """

  units: list[jax.Array]
  ends: list[jax.Array]


class KeepingTick(ticks.TrainingTick):
  """One tick of a schedule with a split head, of stages that are kept."""

  def __init__(self, schedule, device):
    super().__init__(schedule, device)
    rows = jax.tree.leaves(device.stack[0])[0].shape[1]
    # A stage has whole units only.
    self.size = math.gcd(device.stages.recompute_blocks, rows)
    self.units = jnp.arange(rows // self.size)

  def kept(self):
    """Slots of what a stage keeps."""
    slots = self.schedule.num_kept_slots
    units, ends = self._shapes()
    return Kept(
      buffers.unused(units, slots, len(self.units)),
      buffers.unused(ends, slots),
    )

  def forward(self, my, x, kept, total):
    # Not a branch, where XLA would copy all that is kept.
    y, h, stats, kept = ticks.loop(
      'f',
      my['f_chunk'] >= 0,
      lambda carry: self._forward_and_keep(my, x, *carry),
      (*self._idle(my, x), total.stats, kept),
    )
    return y, h, kept, total._replace(stats=stats)

  def backward(self, my, x, kept, incoming, dh, total):
    del x
    return ticks.cond(
      'b',
      my['b_chunk'] >= 0,
      self._pull,
      self.no_backward,
      total,
      my,
      kept,
      incoming,
      dh,
    )

  def _forward_and_keep(self, my, x, y, h, stats, kept):
    del y, h
    x = self.device.stage_input(my, 'f', x)
    state, enter = jax.vjp(self.device.stages.enter, x)

    def step(carry, unit):
      state, units = carry
      state, new, one = self._ahead(my['f_chunk'], unit, state)
      at = my['f_keep'], unit
      units = [
        buffers.write_at(a, at, b) for a, b in zip(units, one, strict=True)
      ]
      return (state, units), new

    carry = axes.cast_varying_everywhere(state), kept.units
    (state, units), new = jax.lax.scan(step, carry, self.units)
    y, leave = jax.vjp(self.device.stages.leave, state)
    ends = self._flatten_ends(enter, leave, y)
    ends = [
      buffers.write_at(a, (my['f_keep'],), b)
      for a, b in zip(kept.ends, ends, strict=True)
    ]
    new = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), new)
    stats = ticks.add_at(stats, my['f_chunk'], new)
    return y, self.closed(my, y), stats, Kept(units, ends)

  def _ahead(self, chunk, unit, state):
    """A unit's output, its statistics, and what is kept: a list of arrays."""
    blocks = self._unit_of(self.device.stack, chunk, unit)
    (state, extra), pull_back, stats = ticks.differentiate(
      self.device.stages.run, blocks, state
    )
    leaves, tree = jax.tree.flatten((pull_back, extra))
    own = jax.tree.leaves(blocks[0])
    # For each leaf the weight that it is, or its place in the list.
    places, saved = [], []
    for leaf in leaves:
      weight = _position(own, leaf)
      if weight is None and _position(saved, leaf) is None:
        saved.append(leaf)
      places.append((weight, _position(saved, leaf)))
    self._restore = tree, places
    return (
      axes.cast_varying_everywhere(state),
      stats,
      axes.cast_varying_everywhere(saved),
    )

  def _flatten_ends(self, enter, leave, y):
    leaves, self._ends = jax.tree.flatten((enter, leave, y))
    return axes.cast_varying_everywhere(leaves)

  def _pull(self, total, my, kept, incoming, dh):
    """B: pulls back through what F has kept."""
    slot, chunk = my['b_keep'], my['b_chunk']
    ends = buffers.read_slot(kept.ends, slot)
    enter, leave, y = jax.tree.unflatten(self._ends, ends)
    dy, total = self.at_the_end(my, incoming, total, y, dh)
    tree, places = self._restore

    def step(carry, unit):
      d_state, sums = carry
      saved = [buffers.read_at(leaf, (slot, unit)) for leaf in kept.units]
      weights = jax.tree.leaves(
        self._unit_of(self.device.stack[0], chunk, unit)
      )
      leaves = [
        saved[place] if weight is None else weights[weight]
        for weight, place in places
      ]
      pull_back, extra = jax.tree.unflatten(tree, leaves)
      d_weights, d_state = pull_back((d_state, jnp.ones_like(extra)))
      sums = self._add(sums, chunk, unit, d_weights)
      return (axes.cast_varying_everywhere(d_state), sums), None

    d_state = axes.cast_varying_everywhere(leave(dy)[0])
    (d_state, blocks), _ = jax.lax.scan(
      step, (d_state, total.blocks), self.units, reverse=True
    )
    (dx,) = enter(d_state)
    return self.at_the_start(my, dx, total._replace(blocks=blocks))

  def _unit_of(self, tree, chunk, unit):
    """[v, r, ...] -> the rows of a unit of a chunk."""
    return jax.tree.map(
      lambda leaf: buffers.read_at(leaf, (chunk, unit * self.size), self.size),
      tree,
    )

  @parts.part(parts.ACCUMULATION)
  def _add(self, sums, chunk, unit, new):
    def leaf(total, one):
      at = chunk, unit * self.size
      one = one.astype(total.dtype) + buffers.read_at(total, at, self.size)
      return buffers.write_at(total, at, one, self.size)

    return jax.tree.map(leaf, sums, new)

  def _shapes(self):
    """Shapes of what is kept of a unit, and of the ends of a stage."""

    def both(x):
      state, enter = jax.vjp(self.device.stages.enter, x)
      state, _, unit = self._ahead(0, 0, state)
      y, leave = jax.vjp(self.device.stages.leave, state)
      return unit, self._flatten_ends(enter, leave, y)

    return jax.eval_shape(both, self.device.state)


def _position(arrays, leaf):
  """Where a list holds this very array; None where it does not."""
  return next((i for i, one in enumerate(arrays) if one is leaf), None)
