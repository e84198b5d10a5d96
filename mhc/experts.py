"""SwiGLU experts on tokens that a router has assigned to them.

The rows of all assignments, token by token k of them, are sorted by expert;
what then remains is one matrix product a group of rows, with that group's own
weights. Three ways to compute it:

* `ragged`: `jax.lax.ragged_dot`, on accelerators;
* `blocked`: on CPUs, where ragged_dot lowers to num_experts dense products.
  Groups are padded to whole blocks of rows, each block multiplied with the
  weights of its expert: num_rows + num_experts * BLOCK rows of work at most;
* `capacity`: every expert has the same number of slots, rows beyond are lost.

All three give the same result where nothing is dropped. An expert number past
the last one stands for an expert that is elsewhere: its rows come back as 0.

Over devices, each holds some experts of a layer and some tokens. Tokens travel
to every device of the group (`all_gather`), each adds up what its own experts
say about them, and the sums travel back (`psum_scatter`): for p devices every
token is sent 2 (p - 1) times, whatever k is.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import layers
from mhc import recompute

BLOCK = 64
AXIS = 'expert'  # of the mesh, over which the experts of a layer are split


class Weights(NamedTuple):
  """SwiGLU weights of e experts: d -> f -> d."""

  gate: Float[Array, 'e d f']
  up: Float[Array, 'e d f']
  down: Float[Array, 'e f d']


def dropless(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: Weights,
  *,
  partial: bool = False,
) -> Float[Array, 's k d']:
  """Every expert's output for every token assigned to it.

  `partial` says that some experts are elsewhere.
  """
  order, sizes = _sort(experts, weights.gate.shape[0])
  rows = x[order // experts.shape[1]]
  if partial:
    # Their rows are sorted last.
    here = (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None]
    rows = jnp.where(here, rows, 0)
  out = jax.lax.platform_dependent(
    rows, sizes, weights, cpu=blocked, default=ragged
  )
  if partial:
    out = jnp.where(here, out, 0)
  return _unsort(out, order, experts.shape)


def capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: Weights,
  slots: int,
) -> tuple[Float[Array, 's k d'], Float[Array, '']]:
  """As `dropless` with `slots` rows an expert at most.

  Returns:
    the outputs, 0 where an assignment found no slot (later tokens lose), and
    the share of such assignments.
  """
  num_experts = weights.gate.shape[0]
  order, sizes = _sort(experts, num_experts)
  rows = x[order // experts.shape[1]]
  group, rank = _places(sizes, len(rows))
  late = (rank >= slots) & (group < num_experts)
  place = jnp.where(late, num_experts * slots, group * slots + rank)
  out = _in_blocks(rows, place, slots, jnp.arange(num_experts), weights)
  dropped = jnp.mean(late.astype(jnp.float32))
  return _unsort(out, order, experts.shape), dropped


def over_devices(
  apply: Callable,
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'],
  num_local: int,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """Applies experts that are split over the mesh axis `AXIS`.

  Args:
    apply: (tokens, experts, gates) of the whole group -> what the `num_local`
      experts of this device add to the tokens, and the share of assignments
      that they dropped.
    x, experts, gates: of this device's tokens, experts numbered over the group.
    num_local: experts here.
  """
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
  experts = gather(experts) - num_local * jax.lax.axis_index(AXIS)
  elsewhere = (experts < 0) | (experts >= num_local)
  out, dropped = apply(
    gather(x), jnp.where(elsewhere, num_local, experts), gather(gates)
  )
  out = jax.lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True)
  return out, jax.lax.psum(dropped, AXIS)


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
  place = first.at[group].get(mode='fill', fill_value=num_blocks) * block + rank
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
