"""Stages that are kept: F saves what its gradient needs, B only pulls back.

`ticks.TrainingTick` computes a stage again in B from its input. Here what
`jax.vjp` keeps of F goes to a slot of the schedule until B: everything but the
weights, which are there anyway. That saves a forward pass a stage and costs
memory, `num_kept_slots` times what one stage keeps.
"""

import jax
import jax.numpy as jnp

from mhc import axes
from mhc.pipeline import buffers
from mhc.pipeline import ticks


class KeepingTick(ticks.TrainingTick):
  """One tick of a schedule with a split head, of stages that are kept."""

  def kept(self):
    """Slots of what a stage keeps; the last is for ticks without F."""
    slots = self.schedule.num_kept_slots + 1
    return buffers.unused(self._shapes(), slots)

  def forward(self, my, x, kept, total):
    y, h, new, stats = ticks.cond(
      'f',
      my['f_chunk'] >= 0,
      self._forward_and_keep,
      self._nothing,
      my,
      x,
      total.stats,
    )
    # Not in the branch, where XLA would copy all of the buffer.
    slot = my['f_keep']
    slot = jnp.where(slot >= 0, slot, self.schedule.num_kept_slots)
    kept = [
      jax.lax.dynamic_update_index_in_dim(all_of_it, one, slot, 0)
      for all_of_it, one in zip(kept, new, strict=True)
    ]
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

  def _forward_and_keep(self, my, x, stats):
    x = self.device.stage_input(my, 'f', x)
    y, new, leaves = self._ahead(my['f_chunk'], x)
    stats = ticks.add_at(stats, my['f_chunk'], new)
    return y, self.closed(my, y), leaves, stats

  def _nothing(self, my, x, stats):
    del my, x
    device = self.device
    y, h = buffers.unused((device.state, device.hidden))
    return y, h, buffers.unused(self._shapes()), stats

  def _ahead(self, chunk, x):
    """A stage's output, its statistics, and what is kept: a list of arrays."""
    weights, *rest = self.device.chunk(chunk)
    (y, extra), pull_back, stats = self.device.run_vjp(weights, rest, x)
    leaves, tree = jax.tree.flatten((pull_back, y, extra))
    own = jax.tree.leaves(weights)
    # For each leaf the weight that it is, or its place in the list.
    places, saved = [], []
    for leaf in leaves:
      weight = _position(own, leaf)
      if weight is None and _position(saved, leaf) is None:
        saved.append(leaf)
      places.append((weight, _position(saved, leaf)))
    self._restore = tree, places
    return y, stats, axes.cast_varying_everywhere(saved)

  def _pull(self, total, my, kept, incoming, dh):
    """B: pulls back through what F has kept."""
    saved = [buffers.index(leaf, my['b_keep']) for leaf in kept]
    weights = jax.tree.leaves(self.device.chunk(my['b_chunk'])[0])
    tree, places = self._restore
    leaves = [
      saved[place] if weight is None else weights[weight]
      for weight, place in places
    ]
    pull_back, y, extra = jax.tree.unflatten(tree, leaves)
    return self.pulled_back(total, my, y, extra, pull_back, incoming, dh)

  def _shapes(self):
    """Shapes of what is kept of one stage."""
    return jax.eval_shape(lambda x: self._ahead(0, x)[2], self.device.state)


def _position(arrays, leaf):
  """Where a list holds this very array; None where it does not."""
  return next((i for i, one in enumerate(arrays) if one is leaf), None)
