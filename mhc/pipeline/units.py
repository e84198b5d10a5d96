"""A stage unit by unit, each a recompute block, forward and back.

What `jax.vjp` keeps of a unit is a list of arrays, without the weights, which
are there anyway. So every array is moved once: a unit's weights are sliced from
the stack, and its gradient is added to its place in the sum.
"""

import math

import jax
import jax.numpy as jnp

from mhc import axes
from mhc.model import parts
from mhc.pipeline import buffers


class Units:
  """The units of a device's stages; `numbers` counts them in a stage."""

  def __init__(self, stages, stack):
    """`stack`: weights, biases and `is_real` of the stages, [v, r, ...]."""
    self._stages, self._stack = stages, stack
    rows = jax.tree.leaves(stack[0])[0].shape[1]
    # A stage has whole units only.
    self._size = math.gcd(stages.recompute_blocks, rows)
    self.numbers = jnp.arange(rows // self._size)

  def forward(self, chunk, state):
    """A stage's output."""

    def step(state, unit):
      blocks = self._of(self._stack, chunk, unit)
      state, *_ = self._stages.run(*blocks, state)
      return axes.cast_varying_everywhere(state), None

    state = axes.cast_varying_everywhere(state)
    return jax.lax.scan(step, state, self.numbers)[0]

  def ahead(self, chunk, unit, state):
    """A unit's output, its statistics, and what is kept: a list of arrays."""
    blocks = self._of(self._stack, chunk, unit)
    (state, extra), pull_back, stats = _differentiate(
      self._stages.run, blocks, state
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

  def back(self, chunk, d_state, sums, saved, read=lambda saved, unit: saved):
    """The gradient of a stage's input, and the sums with that of its weights.

    Args:
      chunk: the stage.
      d_state: the gradient of its output.
      sums: of the weights' gradients, [v, r, ...].
      saved: of `ahead`, [units, ...]; None if `read` knows.
      read: makes the list of a unit of its share of `saved`.

    Returns:
      d_state of the input, and sums.
    """
    tree, places = self._restore

    def step(carry, xs):
      d_state, sums = carry
      unit, saved = xs
      saved = read(saved, unit)
      weights = jax.tree.leaves(self._of(self._stack[0], chunk, unit))
      leaves = [
        saved[place] if weight is None else weights[weight]
        for weight, place in places
      ]
      pull_back, extra = jax.tree.unflatten(tree, leaves)
      d_weights, d_state = pull_back((d_state, jnp.ones_like(extra)))
      sums = self._add(sums, chunk, unit, d_weights)
      return (axes.cast_varying_everywhere(d_state), sums), None

    carry = axes.cast_varying_everywhere(d_state), sums
    carry, _ = jax.lax.scan(step, carry, (self.numbers, saved), reverse=True)
    return carry

  def _of(self, tree, chunk, unit):
    """[v, r, ...] -> the rows of a unit of a chunk."""
    return jax.tree.map(
      lambda leaf: buffers.read_at(
        leaf, (chunk, unit * self._size), self._size
      ),
      tree,
    )

  @parts.part(parts.ACCUMULATION)
  def _add(self, sums, chunk, unit, new):
    def leaf(total, one):
      at = chunk, unit * self._size
      one = one.astype(total.dtype) + buffers.read_at(total, at, self._size)
      return buffers.write_at(total, at, one, self._size)

    return jax.tree.map(leaf, sums, new)


def of_blocks(stats):
  """Statistics of units, [units, size, ...] -> [r, ...]."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)


def _differentiate(run, blocks, state):
  """`run(*blocks, state)`: (state, extra), what pulls back, statistics.

  The gradients are those of the blocks' weights and of the state.
  """
  weights, *rest = blocks

  def outputs(weights, state):
    state, extra, stats = run(weights, *rest, state)
    return (state, extra), stats

  return jax.vjp(outputs, weights, state, has_aux=True)


def _position(arrays, leaf):
  """Where a list holds this very array; None where it does not."""
  return next((i for i, one in enumerate(arrays) if one is leaf), None)
