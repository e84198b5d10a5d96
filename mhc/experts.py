"""SwiGLU experts on tokens that a router has assigned to them.

The rows of all assignments, token by token k of them, are sorted by expert;
what then remains is one matrix product a group of rows, with that group's own
weights. Three ways to compute it:

* `ragged`: `jax.lax.ragged_dot`, on accelerators;
* `blocked`: on CPUs, where ragged_dot lowers to num_experts dense products.
  Groups are padded to whole blocks of rows, each block multiplied with the
  weights of its expert: num_rows + num_experts * BLOCK rows of work at most;
* `capacity`: every expert has the same number of slots, rows beyond are lost.

All three give the same result where nothing is dropped.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import layers
from mhc import recompute

BLOCK = 32


class Weights(NamedTuple):
  """SwiGLU weights of e experts: d -> f -> d."""

  gate: Float[Array, 'e d f']
  up: Float[Array, 'e d f']
  down: Float[Array, 'e f d']


def dropless(
  x: Float[Array, 's d'], experts: Int[Array, 's k'], weights: Weights
) -> Float[Array, 's k d']:
  """Every expert's output for every token assigned to it."""
  order, sizes = _sort(experts, weights.gate.shape[0])
  rows = x[order // experts.shape[1]]
  out = jax.lax.platform_dependent(
    rows, sizes, weights, cpu=blocked, default=ragged
  )
  return _unsort(out, order, experts.shape)


def capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: Weights,
  factor: float,
) -> tuple[Float[Array, 's k d'], Float[Array, '']]:
  """As `dropless` with ceil(factor s k / e) slots an expert.

  Returns:
    the outputs, 0 where an assignment found no slot (later tokens lose), and
    the share of such assignments.
  """
  num_experts = weights.gate.shape[0]
  slots = math.ceil(factor * experts.size / num_experts)
  order, sizes = _sort(experts, num_experts)
  rows = x[order // experts.shape[1]]
  group, rank = _places(sizes, len(rows))
  place = jnp.where(rank < slots, group * slots + rank, num_experts * slots)
  out = _in_blocks(rows, place, slots, jnp.arange(num_experts), weights)
  dropped = jnp.mean((rank >= slots).astype(jnp.float32))
  return _unsort(out, order, experts.shape), dropped


def ragged(
  rows: Float[Array, 'r d'], sizes: Int[Array, 'e'], weights: Weights
) -> Float[Array, 'r d']:
  """Rows sorted by expert, `sizes` of them each."""
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
  gate = recompute.inner(dot(rows, weights.gate))
  up = recompute.inner(dot(rows, weights.up))
  return dot(recompute.inner(layers.swiglu(gate, up)), weights.down)


def blocked(
  rows: Float[Array, 'r d'], sizes: Int[Array, 'e'], weights: Weights
) -> Float[Array, 'r d']:
  """`ragged` with the groups padded to blocks."""
  num_rows, num_experts = len(rows), len(sizes)
  block = min(BLOCK, max(1, num_rows // num_experts))
  num_blocks = num_rows // block + num_experts
  last = jnp.cumsum(-(-sizes // block))  # blocks up to each expert
  group, rank = _places(sizes, num_rows)
  first = jnp.concatenate([jnp.zeros(1, last.dtype), last[:-1]])
  place = first[group] * block + rank
  owner = jnp.searchsorted(last, jnp.arange(num_blocks), side='right')
  owner = jnp.minimum(owner, num_experts - 1)
  return _in_blocks(rows, place, block, owner, weights)


def _in_blocks(rows, place, block, owner, weights):
  """Rows at their places in [len(owner), block] slots, through the experts."""
  buffer = jnp.zeros((len(owner) * block, rows.shape[1]), rows.dtype)
  # Places past the end are dropped on the way in and read as 0 on the way out.
  buffer = buffer.at[place].set(rows, mode='drop', unique_indices=True)
  buffer = buffer.reshape(len(owner), block, -1)
  w_gate, w_up, w_down = (w[owner] for w in weights)
  gate = recompute.inner(jnp.matmul(buffer, w_gate))
  up = recompute.inner(jnp.matmul(buffer, w_up))
  hidden = recompute.inner(layers.swiglu(gate, up))
  out = jnp.matmul(hidden, w_down).reshape(len(owner) * block, -1)
  return out.at[place].get(mode='fill', fill_value=0)


def _sort(experts, num_experts):
  """The assignments in order of expert, and how many each has."""
  flat = experts.reshape(-1)
  return jnp.argsort(flat), jnp.bincount(flat, length=num_experts)


def _unsort(out, order, shape):
  return out[jnp.argsort(order)].reshape(*shape, -1)


def _places(sizes, num_rows):
  """(expert, rank within it) of each sorted row."""
  last = jnp.cumsum(sizes)
  rows = jnp.arange(num_rows)
  group = jnp.searchsorted(last, rows, side='right')
  return group, rows - (last - sizes)[group]
