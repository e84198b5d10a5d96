"""Rows that travel to their experts and back, each moved once, by gathers.

A token has k assignments. Sorted by expert they are a queue, and the rows of a
buffer stand for some of them:

    spread     row_r = x[token_r]
    collect    y_t = sum_j gate_tj row[place_tj]

The gradient of either is the other, so that nothing is ever scattered, which
TPUs do by sorting once more. `token` and `place` are two sides of one
correspondence: each names the other, or one past the last for none, which
reads as 0.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Queue(NamedTuple):
  """The assignments of s tokens, k each, in order of e experts.

  Attributes:
    order: the assignment at each place; those of no expert come last.
    rank: the place of each assignment.
    starts: the place of each expert's first; the last is how many have one.
  """

  order: Int[Array, 'sk']
  rank: Int[Array, 's k']
  starts: Int[Array, 'e1']

  @property
  def counts(self) -> Int[Array, 'e']:
    """How many assignments each expert has."""
    return jnp.diff(self.starts)


class Route(NamedTuple):
  """Which rows of a buffer stand for which assignments.

  Attributes:
    token: whose each of the m rows is; s for a row that stands for none.
    slot: which of the token's assignments.
    place: the row of each assignment; m for one that has none.
  """

  token: Int[Array, 'm']
  slot: Int[Array, 'm']
  place: Int[Array, 's k']


def make_queue(experts: Int[Array, 's k'], num_experts: int) -> Queue:
  """Sorts assignments; a number of `num_experts` or more is no expert."""
  flat = experts.reshape(-1)
  numbers = jnp.arange(flat.size, dtype=jnp.int32)
  order = jnp.argsort(flat).astype(jnp.int32)
  # The inverse permutation, without a second sort.
  rank = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
  bounds = jnp.arange(num_experts + 1, dtype=flat.dtype)
  starts = jnp.sum(flat[None] < bounds[:, None], axis=1, dtype=jnp.int32)
  return Queue(order, rank.reshape(experts.shape), starts)


def window(
  queue: Queue, first: int | Int[Array, ''], size: int
) -> tuple[Route, Int[Array, 'e']]:
  """The route of `size` places from `first` on, and how many each expert has.

  The rows are those places of the queue; behind its end they stand for none.
  """
  row = first + jnp.arange(size, dtype=jnp.int32)
  rank = queue.rank - first
  there = (rank >= 0) & (rank < size) & (queue.rank < queue.starts[-1])
  route = routed(queue, row, jnp.where(there, rank, size))
  return route, jnp.diff(jnp.clip(queue.starts - first, 0, size))


def rooms(queue: Queue, room: int, first: int | Int[Array, ''] = 0) -> Route:
  """The route to a buffer that has `room` rows for each expert.

  They stand for the expert's assignments from `first` on; others have no row.
  """
  num_experts = len(queue.counts)
  owner = jnp.searchsorted(queue.starts[1:], queue.rank, side='right')
  late = queue.rank - queue.starts[owner] - first
  there = (late >= 0) & (late < room) & (owner < num_experts)
  place = jnp.where(there, owner * room + late, num_experts * room)
  return routed(queue, room_rows(queue, room, first), place.astype(jnp.int32))


def room_rows(
  queue: Queue, room: int, first: int | Int[Array, '']
) -> Int[Array, 'm']:
  """The place in the queue of each row of `rooms`; its length for none."""
  within = first + jnp.arange(room, dtype=jnp.int32)
  row = queue.starts[:-1, None] + within[None]
  there = row < queue.starts[1:, None]
  return jnp.where(there, row, queue.order.size).reshape(-1)


def routed(
  queue: Queue, row: Int[Array, 'm'], place: Int[Array, 's k']
) -> Route:
  """The route of rows that stand for these places of the queue."""
  total = queue.order.size
  row = jnp.where(row < queue.starts[-1], row, total)
  source = queue.order.at[row].get(mode='fill', fill_value=total)
  k = queue.rank.shape[1]
  return Route(source // k, source % k, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(
  x: Float[Array, 's d'], route: Route, blank: bool = True
) -> Float[Array, 'm d']:
  """The rows; where one stands for no assignment 0 or, not `blank`, anything.

  To blank them takes another pass over the rows, which is for nothing where
  nobody reads them.
  """
  return _taken(x, route.token, blank)


def _spread_forward(x, route, blank):
  return spread(x, route, blank), route


def _spread_backward(blank, route, g):
  del blank
  return _summed(g, route.place, None), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def spread_gates(gates: Float[Array, 's k'], route: Route) -> Float[Array, 'm']:
  """The gate of each row's assignment; 0 where it stands for none."""
  at = route.token, route.slot
  return gates.at[at].get(mode='fill', fill_value=0)


def _spread_gates_forward(gates, route):
  return spread_gates(gates, route), route


def _spread_gates_backward(route, g):
  return _taken(g, route.place), None


spread_gates.defvjp(_spread_gates_forward, _spread_gates_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def collect(
  rows: Float[Array, 'm d'],
  gates: Float[Array, 's k'] | None,
  route: Route,
  blank: bool = True,
) -> Float[Array, 's d']:
  """The gated sum over each token's rows; gates=None stands for 1.

  `blank` is about the gradient's rows, as for `spread`.
  """
  return _summed(rows, route.place, gates)


def _collect_forward(rows, gates, route, blank):
  kept = None if gates is None else rows
  return collect(rows, gates, route, blank), (kept, gates, route)


def _collect_backward(blank, kept, g):
  rows, gates, route = kept
  d_rows = _taken(g, route.token, blank)
  if gates is None:
    return d_rows, None, None
  dots = jnp.sum((rows * d_rows).astype(jnp.float32), axis=1)
  d_gates = _taken(dots, route.place).astype(gates.dtype)
  own = spread_gates(gates, route)
  return d_rows * own[:, None].astype(d_rows.dtype), d_gates, None


collect.defvjp(_collect_forward, _collect_backward)


def _taken(x, at, blank=True):
  if not blank:
    return x.at[at].get(mode='clip')
  return x.at[at].get(mode='fill', fill_value=0)


def _summed(rows, place, gates):
  total = jnp.zeros((), jnp.float32)
  for slot in range(place.shape[1]):
    part = _taken(rows, place[:, slot]).astype(jnp.float32)
    total = total + (part if gates is None else part * gates[:, slot, None])
  return total.astype(rows.dtype)
