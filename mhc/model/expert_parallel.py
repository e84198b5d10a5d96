r"""Expert parallelism: tokens travel to their experts, and results back.

The experts of a layer are split over the p devices of the mesh axis `EXPERT`, e
of them each, and so are the tokens, s on a device, each with k experts.
Dropless dispatch computes in rounds: a queue of assignments sends its first
rows, for which there is room in buffers of `buffer_factor` times the mean, then
the next.
There are as many rounds as the longest queue of the group needs, so that
nothing is lost under any load and an even one takes one round. Only the first
round keeps anything for its gradient.

    all_to_all          A device has a queue for each other and sends it
                        q = factor s k / p rows.
    ragged_all_to_all   The same without the unused rows; not on CPUs.
    all_gather          Every token goes to every device, which has one queue,
                        of the assignments to its experts; their outputs are
                        added up by a reduce-scatter.

The first two send about 2 k (p - 1) / p rows a token and back, the last
2 (p - 1), in rings that use every link of a torus, where all_to_all does not.

With a capacity an expert has the same number of rows for each device's tokens
(`all_gather`: for those of the group), the others are dropped. An expert number
past the last is no expert: nothing is sent, and the result is 0.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import axes
from mhc import config as config_lib
from mhc.axes import EXPERT
from mhc.kernels import platform as platform_lib
from mhc.model import experts as experts_lib
from mhc.model import recompute
from mhc.model import rows as rows_lib

# The scope of further rounds, by which they are found in the compiled program.
OVERFLOW = 'overflow'

Tree = Any
Transport = Literal['all_to_all', 'ragged_all_to_all', 'all_gather']


def transport(config: config_lib.MoEConfig, num_devices: int) -> Transport:
  """The transport that is set; by default what sends least here."""
  if config.transport != 'auto':
    return config.transport
  if num_devices <= config.experts_per_token:
    return 'all_gather'
  return (
    'all_to_all' if platform_lib.platform() == 'cpu' else 'ragged_all_to_all'
  )


def dispatch_and_combine(
  config: config_lib.MoEConfig,
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'],
  weights: experts_lib.Weights,
  beside: Tree = None,
) -> tuple[Float[Array, 's d'], Float[Array, ''], Tree]:
  """The gated sum over the experts of every token.

  Args:
    config: of the layer.
    x, experts, gates: of this device's tokens, experts numbered over the group.
    weights: of this device's experts.
    beside: arrays of this device. With all_gather what is computed of the
      returned ones waits for the experts' products, so that it fills the way
      back of their results, and its gradient the way of theirs.

  Returns:
    the sum, the share of assignments that were dropped, and `beside`.
  """
  way = transport(config, jax.lax.axis_size(EXPERT))
  if way == 'all_gather':
    return _by_all_gather(config, x, experts, gates, weights, beside)
  if config.dispatch == 'dropless':
    ragged = way == 'ragged_all_to_all'
    out = _by_all_to_all(config, ragged, x, experts, gates, weights)
    return out, jnp.zeros((), jnp.float32), beside
  rows = experts_lib.expert_capacity(config, experts)
  return *by_capacity(x, experts, gates, weights, rows), beside


def _by_all_to_all(config, ragged, x, experts, gates, weights):
  """Dropless dispatch by one of the two all_to_all."""
  p, e = jax.lax.axis_size(EXPERT), weights.gate.shape[0]
  (s, k), rows = experts.shape, experts.size
  # Sorted by expert is sorted by device: a queue for each.
  queue = rows_lib.make_queue(experts, p * e)
  queue = queue._replace(starts=queue.starts[::e])
  local = experts.reshape(-1)[queue.order] % e
  # A token has at most min(k, e) of its experts on one device.
  longest = s * min(k, e)
  size = min(longest, max(1, math.ceil(config.buffer_factor * rows / p)))
  one_round = functools.partial(_send_round, size, ragged)
  return _all_rounds(
    one_round,
    size,
    longest,
    jnp.max(queue.counts),
    (queue, local),
    (x, gates),
    weights,
  )


def _send_round(size, ragged, number, queues, inputs, weights):
  """This round's contribution to every token's output, [s, d]."""
  (queue, local), (x, gates) = queues, inputs
  first, e = number * size, weights.gate.shape[0]
  route = rows_lib.rooms(queue, size, first)
  rows = rows_lib.spread(x, route).reshape(-1, size, x.shape[1])
  names = local.at[rows_lib.room_rows(queue, size, first)]
  names = _all_to_all(names.get(mode='fill', fill_value=e).reshape(-1, size))
  sent = jnp.clip(queue.counts - first, 0, size)
  if ragged:
    received = _all_to_all(sent)
    carry, back = (
      functools.partial(_ragged, sent=a, received=b)
      for a, b in ((sent, received), (received, sent))
    )
  else:
    carry = back = _all_to_all
  arrived = carry(rows)
  out = experts_lib.dropless(
    arrived.reshape(-1, x.shape[1]), names.reshape(-1, 1), None, weights
  )
  out = back(out.reshape(arrived.shape))
  return rows_lib.collect(out.reshape(-1, x.shape[1]), gates, route)


def _by_all_gather(config, x, experts, gates, weights, beside):
  """Either dispatch by all_gather and reduce-scatter."""
  gather = functools.partial(jax.lax.all_gather, axis_name=EXPERT, tiled=True)
  e = weights.gate.shape[0]
  rows = config.buffer_factor * experts.size
  # The tokens first: while they travel the router computes.
  x, experts, gates = jax.lax.optimization_barrier((gather(x), experts, gates))
  local = gather(experts) - e * jax.lax.axis_index(EXPERT)
  # Choices, gates and their order are small, and do not travel twice.
  local = recompute.name_inner(jnp.where((local < 0) | (local >= e), e, local))
  everyone = x, recompute.name_inner(gather(gates))
  if config.dispatch == 'dropless':
    queue = jax.tree.map(recompute.name_inner, rows_lib.make_queue(local, e))
    longest = len(local) * min(local.shape[1], e)
    size = min(longest, math.ceil(rows))
    one_round = functools.partial(_local_round, size)
    length = queue.starts[-1]
    out = _all_rounds(
      one_round, size, longest, length, queue, everyone, weights
    )
    dropped = jnp.zeros((), jnp.float32)
  else:
    out, dropped = experts_lib.capacity(
      everyone[0],
      local,
      everyone[1],
      weights,
      experts_lib.expert_capacity(config, local),
    )
    dropped = jax.lax.psum(dropped, EXPERT)
  out, beside = jax.lax.optimization_barrier((out, beside))
  out = jax.lax.psum_scatter(out, EXPERT, scatter_dimension=0, tiled=True)
  return out, dropped, beside


def _local_round(size, number, queue, inputs, weights):
  """The outputs of this device's experts in a round, for all tokens."""
  x, gates = inputs
  route, sizes = rows_lib.window(queue, number * size, size)
  return experts_lib.routed(x, route, sizes, gates, weights)


def _all_rounds(one_round, size, longest, length, queues, inputs, weights):
  """The sum over rounds of one_round(number, queues, inputs, weights)."""
  if longest <= size:
    return one_round(_first(), queues, inputs, weights)
  number = -(-jax.lax.pmax(length, EXPERT) // size)
  over = axes.varying_axes((queues, inputs, weights))
  number = axes.cast_varying(number, over)
  return _rounds(one_round, number, queues, inputs, weights)


def _first():
  return jnp.zeros((), jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(one_round, number, queues, inputs, weights):
  """Rounds 0 to number - 1. An even load has one, and does nothing more."""
  return _rounds_forward(one_round, number, queues, inputs, weights)[0]


def _rounds_forward(one_round, number, queues, inputs, weights):
  total, pull_back = jax.vjp(
    functools.partial(one_round, _first(), queues), inputs, weights
  )

  def add(index, total):
    return total + one_round(index, queues, inputs, weights)

  total = _further(number, add, total)
  return total, (pull_back, number, queues, inputs, weights)


def _rounds_backward(one_round, kept, g):
  pull_back, number, queues, inputs, weights = kept

  def add(index, total):
    one = functools.partial(one_round, index, queues)
    _, pull_back = jax.vjp(one, inputs, weights)
    return jax.tree.map(jnp.add, total, pull_back(g))

  return None, None, *_further(number, add, pull_back(g))


def _further(number, add, total):
  """add(1, total), add(2, .), ... to number - 1, if there are any."""
  with jax.named_scope(OVERFLOW):
    return jax.lax.cond(
      number > 1,
      lambda total: jax.lax.fori_loop(1, number, add, total),
      lambda total: total,
      total,
    )


_rounds.defvjp(_rounds_forward, _rounds_backward)


def by_capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'] | None,
  weights: experts_lib.Weights,
  rows_per_expert: int,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """`experts.capacity` with the bound for each device's tokens."""
  num_devices, num_local = jax.lax.axis_size(EXPERT), weights.gate.shape[0]

  def apply(buffer):
    rows = _all_to_all(
      buffer.reshape(num_devices, num_local, rows_per_expert, -1)
    )
    rows = jnp.swapaxes(rows, 0, 1).reshape(num_local, -1, x.shape[1])
    out = experts_lib.batched(rows, weights)
    out = out.reshape(num_local, num_devices, rows_per_expert, -1)
    return _all_to_all(jnp.swapaxes(out, 0, 1)).reshape(buffer.shape)

  num_experts = num_devices * num_local
  return experts_lib.with_capacity(
    x, experts, gates, num_experts, rows_per_expert, apply
  )


def _all_to_all(x):
  """x[i] of device j becomes x[j] of device i."""
  return jax.lax.all_to_all(x, EXPERT, 0, 0, tiled=True)


def _ragged(rows, sent, received):
  """`_all_to_all` of the first sent[i] rows of each rows[i], the others 0."""
  num_devices, size, dim = rows.shape
  places = jnp.arange(num_devices, dtype=jnp.int32) * size
  here = jnp.full(num_devices, jax.lax.axis_index(EXPERT) * size, jnp.int32)
  flat = rows.reshape(-1, dim)
  flat = jax.lax.ragged_all_to_all(
    flat,
    axes.cast_varying(
      jnp.zeros(flat.shape, flat.dtype), axes.varying_axes(flat)
    ),
    *axes.unify_varying(
      places, sent.astype(jnp.int32), here, received.astype(jnp.int32)
    ),
    axis_name=EXPERT,
  )
  return flat.reshape(rows.shape)
