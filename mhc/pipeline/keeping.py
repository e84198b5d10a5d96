"""When what a stage's gradient needs is made: in B again, or in F, and kept.

`RecomputingTick` computes a stage in B again, from its input. `KeepingTick`
keeps what `jax.vjp` keeps of F in a slot of the schedule until B, which only
pulls back. That saves a forward pass a stage and costs memory, `num_kept_slots`
times what one stage keeps. Both go unit by unit (`units`).
"""

from typing import NamedTuple

import jax

from mhc import axes
from mhc.pipeline import buffers
from mhc.pipeline import ticks
from mhc.pipeline import units as units_lib


class RecomputingTick(ticks.TrainingTick):
  """One tick of a schedule, of stages of which F keeps nothing."""

  def kept(self):
    return ()

  def forward(self, my, x, kept, total):
    y, h = ticks.cond('f', my['f_chunk'] >= 0, self._run, self.idle, my, x)
    return y, h, kept, total

  def backward(self, my, x, kept, incoming, dh, total):
    del kept
    return ticks.cond(
      'b',
      my['b_chunk'] >= 0,
      self._run_and_pull,
      self.no_backward,
      total,
      my,
      x,
      incoming,
      dh,
    )

  def _run(self, my, x):
    stages = self.device.stages
    state = stages.enter(self.device.stage_input(my, 'f', x))
    y = stages.leave(self.device.units.forward(my['f_chunk'], state))
    return y, self.closed(my, y)

  def _run_and_pull(self, total, my, x, incoming, dh):
    """B: the gradient of the stage's input; the totals with its share."""
    chunk, stages = my['b_chunk'], self.device.stages
    x = self.device.stage_input(my, 'b', x)
    state, enter = jax.vjp(stages.enter, x)

    def step(state, unit):
      state, stats, saved = self.device.units.ahead(chunk, unit, state)
      return state, (stats, saved)

    state = axes.cast_varying_everywhere(state)
    state, (stats, saved) = jax.lax.scan(step, state, self.device.units.numbers)
    y, leave = jax.vjp(stages.leave, state)
    stats = ticks.add_at(total.stats, chunk, units_lib.of_blocks(stats))
    total = total._replace(stats=stats)
    dy, total = self.at_the_end(my, incoming, total, y, dh)
    d_state, blocks = self.device.units.back(
      chunk, leave(dy)[0], total.blocks, saved
    )
    (dx,) = enter(d_state)
    return self.at_the_start(my, dx, total._replace(blocks=blocks))


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

  def kept(self):
    """Slots of what a stage keeps."""
    slots = self.schedule.num_kept_slots
    units, ends = self._shapes()
    return Kept(
      buffers.unused(units, slots, len(self.device.units.numbers)),
      buffers.unused(ends, slots),
    )

  def forward(self, my, x, kept, total):
    # Not a branch, where XLA would copy all that is kept.
    y, h, stats, kept = ticks.loop(
      'f',
      my['f_chunk'] >= 0,
      lambda carry: self._run_and_keep(my, x, *carry),
      (*self.idle(my, x), total.stats, kept),
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

  def _run_and_keep(self, my, x, y, h, stats, kept):
    del y, h
    x = self.device.stage_input(my, 'f', x)
    state, enter = jax.vjp(self.device.stages.enter, x)

    def step(carry, unit):
      state, units = carry
      state, new, one = self.device.units.ahead(my['f_chunk'], unit, state)
      at = my['f_keep'], unit
      units = [
        buffers.write_at(a, at, b) for a, b in zip(units, one, strict=True)
      ]
      return (state, units), new

    carry = axes.cast_varying_everywhere(state), kept.units
    (state, units), new = jax.lax.scan(step, carry, self.device.units.numbers)
    y, leave = jax.vjp(self.device.stages.leave, state)
    ends = self._flatten_ends(enter, leave, y)
    ends = [
      buffers.write_at(a, (my['f_keep'],), b)
      for a, b in zip(kept.ends, ends, strict=True)
    ]
    stats = ticks.add_at(stats, my['f_chunk'], units_lib.of_blocks(new))
    return y, self.closed(my, y), stats, Kept(units, ends)

  def _flatten_ends(self, enter, leave, y):
    leaves, self._ends = jax.tree.flatten((enter, leave, y))
    return axes.cast_varying_everywhere(leaves)

  def _pull(self, total, my, kept, incoming, dh):
    """B: pulls back through what F has kept."""
    slot = my['b_keep']
    ends = buffers.read_slot(kept.ends, slot)
    enter, leave, y = jax.tree.unflatten(self._ends, ends)
    dy, total = self.at_the_end(my, incoming, total, y, dh)

    def read(_, unit):
      return [buffers.read_at(leaf, (slot, unit)) for leaf in kept.units]

    d_state, blocks = self.device.units.back(
      my['b_chunk'], leave(dy)[0], total.blocks, None, read
    )
    (dx,) = enter(d_state)
    return self.at_the_start(my, dx, total._replace(blocks=blocks))

  def _shapes(self):
    """Shapes of what is kept of a unit, and of the ends of a stage."""

    def both(x):
      state, enter = jax.vjp(self.device.stages.enter, x)
      state, _, unit = self.device.units.ahead(0, 0, state)
      y, leave = jax.vjp(self.device.stages.leave, state)
      return unit, self._flatten_ends(enter, leave, y)

    return jax.eval_shape(both, self.device.state)
