"""SwiGLU experts on tokens that a router has assigned to them.

The rows of all assignments, token by token k of them, are sorted by expert
(`rows`); what then remains is one matrix product a group of rows, with that
group's own weights. Three ways to compute it:

* `ragged`: `jax.lax.ragged_dot`, on TPUs;
* `blocked`: elsewhere, where ragged_dot lowers to num_experts dense products
  (and JAX 0.11.2 comes without the module of its lowering by Triton). Groups
  are padded to whole blocks of rows, each multiplied with a copy of the weights
  of its expert: num_rows + num_experts * block rows of work at most, and as
  many copies as blocks (`rows_of_block`);
* `capacity`: every expert has the same number of slots, rows beyond are lost.

All three give the same result where nothing is dropped. An expert number past
the last one stands for an expert that is elsewhere, and adds nothing.

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
from mhc.model import rows as rows_lib

LEAST_BLOCK = 64  # rows, or an expert's mean if that is less


class Weights(NamedTuple):
  """SwiGLU weights of e experts: d -> f -> d."""

  gate: Float[Array, 'e d f']
  up: Float[Array, 'e d f']
  down: Float[Array, 'e f d']


def dropless(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'] | None,
  weights: Weights,
) -> Float[Array, 's d']:
  """The gated sum over each token's experts; gates=None stands for 1."""
  queue = rows_lib.make_queue(experts, weights.gate.shape[0])
  route, sizes = rows_lib.window(queue, 0, experts.size)
  return routed(x, route, sizes, gates, weights)


def routed(
  x: Float[Array, 's d'],
  route: rows_lib.Route,
  sizes: Int[Array, 'e'],
  gates: Float[Array, 's k'] | None,
  weights: Weights,
) -> Float[Array, 's d']:
  """`dropless` of the assignments that a route has, sorted by expert.

  Gates multiply the hidden rows, not the results: their gradient then needs no
  result, which the backward pass would have to compute again. Rows behind the
  last expert's are never read.
  """
  own = None if gates is None else rows_lib.spread_gates(gates, route)
  # Not by lax.platform_dependent, which in the branches of a pipeline stays a
  # choice at run time, with buffers for both.
  multiply = ragged if platform_lib.platform() == 'tpu' else blocked
  rows = multiply(rows_lib.spread(x, route, False), sizes, weights, own)
  return rows_lib.collect(rows, None, route, False)


def capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'] | None,
  weights: Weights,
  rows_per_expert: int,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """As `dropless` with a bound on the rows of an expert.

  Returns:
    the sum, without the assignments beyond the bound (later tokens lose), and
    the fraction of those.
  """
  apply = functools.partial(batched, weights=weights)
  num_experts = weights.gate.shape[0]
  return with_capacity(x, experts, gates, num_experts, rows_per_expert, apply)


def with_capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'] | None,
  num_experts: int,
  rows_per_expert: int,
  apply: Callable,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """`capacity` with the experts' function of [e, rows_per_expert, d] given."""
  queue = rows_lib.make_queue(experts, num_experts)
  route = rows_lib.rooms(queue, rows_per_expert)
  buffer = rows_lib.spread(x, route)
  out = apply(buffer.reshape(num_experts, rows_per_expert, -1))
  late = jnp.maximum(queue.counts - rows_per_expert, 0)
  dropped = jnp.sum(late) / experts.size
  out = rows_lib.collect(out.reshape(buffer.shape), gates, route)
  return out, dropped.astype(jnp.float32)


def expert_capacity(
  config: config_lib.MoEConfig, experts: Int[Array, 's k']
) -> int:
  """The rows that an expert has for these tokens, with dispatch='capacity'.

  No more than there are tokens, each of which chooses an expert once.
  """
  mean = experts.size / config.num_experts
  return min(len(experts), math.ceil(config.capacity_factor * mean))


@parts.part(parts.EXPERTS)
def batched(
  rows: Float[Array, 'e r d'],
  weights: Weights,
  gates: Float[Array, 'e r'] | None = None,
) -> Float[Array, 'e r d']:
  """r rows of each expert, times a gate each."""
  return _swiglu(jnp.matmul, rows, weights, gates)


@parts.part(parts.EXPERTS)
def ragged(
  rows: Float[Array, 'r d'],
  sizes: Int[Array, 'e'],
  weights: Weights,
  gates: Float[Array, 'r'] | None = None,
) -> Float[Array, 'r d']:
  """Rows sorted by expert, `sizes` of them each, times a gate each."""
  multiply = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
  return _swiglu(multiply, rows, weights, gates)


def _swiglu(multiply, rows, weights, gates):
  gate = recompute.name_routed(multiply(rows, weights.gate))
  up = recompute.name_routed(multiply(rows, weights.up))
  hidden = layers.swiglu(gate, up)
  if gates is not None:
    hidden = (hidden.astype(gates.dtype) * gates[..., None]).astype(rows.dtype)
  return multiply(hidden, weights.down)


def rows_of_block(num_rows: int, num_experts: int) -> int:
  """A power of two up to a quarter of an expert's mean; at least LEAST_BLOCK.

  The rows added are then at most an eighth in the mean, and an expert's weights
  are copied five to nine times. On an H100, compiled, the gradient of 36,864
  rows of the paper's 27B with 18 experts takes 14.4 GB beside its operands in
  blocks of 64, 2.8 in blocks of 512, and 13.1 by `ragged`.
  """
  mean = max(1, num_rows // num_experts)
  return max(min(LEAST_BLOCK, mean), 1 << max(0, (mean // 4).bit_length() - 1))


def blocked(
  rows: Float[Array, 'r d'],
  sizes: Int[Array, 'e'],
  weights: Weights,
  gates: Float[Array, 'r'] | None = None,
) -> Float[Array, 'r d']:
  """`ragged` with the groups padded to blocks."""
  num_rows, num_experts = len(rows), len(sizes)
  block = rows_of_block(num_rows, num_experts)
  num_blocks = num_rows // block + num_experts
  until = jnp.cumsum(sizes)  # rows up to the end of each expert's
  last = jnp.cumsum(-(-sizes // block))  # and blocks
  owner = jnp.searchsorted(last, jnp.arange(num_blocks), side='right')
  owner = jnp.minimum(owner, num_experts - 1)

  # The row at each place of the blocks, and the place of each row.
  place = jnp.arange(num_blocks * block)
  expert = owner[place // block]
  rank = place - (last[expert] - -(-sizes[expert] // block)) * block
  row = until[expert] - sizes[expert] + rank
  row = jnp.where(rank < sizes[expert], row, num_rows)
  number = jnp.arange(num_rows)
  group = jnp.searchsorted(until, number, side='right')
  first = (last - -(-sizes // block)) * block - (until - sizes)
  back = first.at[group].get(mode='fill', fill_value=len(place)) + number
  route = rows_lib.Route(row, jnp.zeros_like(row), back[:, None])

  buffer = rows_lib.spread(rows, route).reshape(num_blocks, block, -1)
  if gates is not None:
    gates = rows_lib.spread_gates(gates[:, None], route)
    gates = gates.reshape(num_blocks, block)
  out = batched(buffer, Weights(*(w[owner] for w in weights)), gates)
  return rows_lib.collect(out.reshape(len(place), -1), None, route)
