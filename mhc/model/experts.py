"""SwiGLU experts on tokens that a router has assigned to them.

The rows of all assignments, token by token k of them, are sorted by expert;
what then remains is one matrix product a group of rows, with that group's own
weights. Three ways to compute it:

* `ragged`: `jax.lax.ragged_dot`, on TPUs;
* `blocked`: elsewhere, where ragged_dot lowers to num_experts dense products.
  Groups are padded to whole blocks of rows, each block multiplied with the
  weights of its expert: num_rows + num_experts * BLOCK rows of work at most;
* `capacity`: every expert has the same number of slots, rows beyond are lost.

All three give the same result where nothing is dropped. An expert number past
the last one stands for an expert that is elsewhere: its rows come back as 0.

`expert_parallel` moves tokens to experts on other devices.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import config as config_lib
from mhc.kernels import platform as platform_lib
from mhc.model import layers
from mhc.model import parts
from mhc.model import recompute

BLOCK = 64


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
  # Not by lax.platform_dependent, which in the branches of a pipeline stays a
  # choice at run time, with buffers for both.
  multiply = ragged if platform_lib.platform() == 'tpu' else blocked
  out = multiply(rows, sizes, weights)
  if partial:
    out = jnp.where(here, out, 0)
  return _unsort(out, order, experts.shape)


def capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: Weights,
  rows_per_expert: int,
) -> tuple[Float[Array, 's k d'], Float[Array, '']]:
  """As `dropless` with a bound on the rows of an expert.

  Returns:
    the outputs, 0 for an assignment beyond the bound (later tokens lose), and
    the fraction of such assignments.
  """
  apply = functools.partial(batched, weights=weights)
  num_experts = weights.gate.shape[0]
  return with_capacity(x, experts, num_experts, rows_per_expert, apply)


def with_capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  num_experts: int,
  rows_per_expert: int,
  apply: Callable,
) -> tuple[Float[Array, 's k d'], Float[Array, '']]:
  """`capacity` with the experts' function of [e, rows_per_expert, d] given."""
  order, sizes = _sort(experts, num_experts)
  rows = x[order // experts.shape[1]]
  group, rank = _places(sizes, len(rows))
  late = (rank >= rows_per_expert) & (group < num_experts)
  end = num_experts * rows_per_expert
  place = jnp.where(late, end, group * rows_per_expert + rank)
  buffer = _placed(rows, place, num_experts, rows_per_expert)
  out = _taken(apply(buffer), place)
  dropped = jnp.mean(late.astype(jnp.float32))
  return _unsort(out, order, experts.shape), dropped


def expert_capacity(
  config: config_lib.MoEConfig, experts: Int[Array, 's k']
) -> int:
  """The rows that an expert has for these tokens, with dispatch='capacity'.

  No more than there are tokens, each of which chooses an expert once.
  """
  mean = experts.size / config.num_experts
  return min(len(experts), math.ceil(config.capacity_factor * mean))


def combine(
  out: Float[Array, 's k d'], gates: Float[Array, 's k']
) -> Float[Array, 's d']:
  """The gated sum over a token's experts."""
  return jnp.sum(out * gates[..., None].astype(out.dtype), axis=1)


@parts.part(parts.EXPERTS)
def batched(
  rows: Float[Array, 'e r d'], weights: Weights
) -> Float[Array, 'e r d']:
  """r rows of each expert."""
  gate = recompute.name_inner(jnp.matmul(rows, weights.gate))
  up = recompute.name_inner(jnp.matmul(rows, weights.up))
  return jnp.matmul(recompute.name_inner(layers.swiglu(gate, up)), weights.down)


@parts.part(parts.EXPERTS)
def ragged(
  rows: Float[Array, 'r d'], sizes: Int[Array, 'e'], weights: Weights
) -> Float[Array, 'r d']:
  """Rows sorted by expert, `sizes` of them each."""
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
  gate = recompute.name_inner(dot(rows, weights.gate))
  up = recompute.name_inner(dot(rows, weights.up))
  return dot(recompute.name_inner(layers.swiglu(gate, up)), weights.down)


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
  buffer = _placed(rows, place, len(owner), block)
  return _taken(batched(buffer, Weights(*(w[owner] for w in weights))), place)


def _placed(rows, place, num_groups, size):
  """Rows at their places in [num_groups, size]; those past the end are lost."""
  buffer = jnp.zeros((num_groups * size, rows.shape[1]), rows.dtype)
  buffer = buffer.at[place].set(rows, mode='drop', unique_indices=True)
  return buffer.reshape(num_groups, size, -1)


def _taken(buffer, place):
  """The rows at their places; past the end they are 0."""
  flat = buffer.reshape(-1, buffer.shape[-1])
  return flat.at[place].get(mode='fill', fill_value=0)


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
