r"""Tokens to the devices of their experts, and the results back.

The experts of a layer are split over the p devices of the mesh axis `AXIS`, e
of them each, and so are the tokens, s on a device, each with k experts.
`dropless` computes in rounds: a queue of assignments gives its first rows, for
which there is room in buffers of `buffer_factor` times the mean, then the next.
There are as many rounds as the longest queue of the group needs, so that
nothing is lost under any load and an even one takes one round. Only the first
round keeps anything for its gradient.

    padded   A device has a queue for each other and sends it q = factor s k / p
             rows by `all_to_all`.
    ragged   The same by `ragged_all_to_all`, which leaves unused rows at home;
             not on CPUs.
    gather   Every token goes to every device, which has one queue, of the
             assignments to its experts, and adds up what they say.

The first two send about 2 k (p - 1) / p rows a token and back, the last
2 (p - 1), in rings that use every link of a torus, where all_to_all does not.

With a capacity an expert has the same number of rows for each device's tokens
(`gather`: for those of the group), the others are dropped.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import axes
from mhc import config as config_lib
from mhc.kernels import platform
from mhc.model import experts as experts_lib

AXIS = experts_lib.AXIS
# The scope of further rounds, by which they are found in the compiled program.
OVERFLOW = 'overflow'

Transport = Literal['padded', 'ragged', 'gather']


def transport(config: config_lib.MoEConfig, num_devices: int) -> Transport:
  """What `auto` stands for: what sends least on the platform at hand."""
  if config.transport != 'auto':
    return config.transport
  if num_devices <= config.experts_per_token:
    return 'gather'
  return 'padded' if platform.platform() == 'cpu' else 'ragged'


def apply(
  config: config_lib.MoEConfig,
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'],
  weights: experts_lib.Weights,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """The gated sum over the experts of every token.

  Args:
    config: of the layer.
    x, experts, gates: of this device's tokens, experts numbered over the group.
    weights: of this device's experts.

  Returns:
    the sum, and the share of assignments that were dropped.
  """
  way = transport(config, jax.lax.axis_size(AXIS))
  if way == 'gather':
    return _gathered(config, x, experts, gates, weights)
  if config.dispatch == 'dropless':
    out = _sent(config, way == 'ragged', x, experts, gates, weights)
    return out, jnp.zeros(())
  out, dropped = by_capacity(x, experts, weights, slots(config, experts))
  return gated(out, gates), dropped


def gated(
  out: Float[Array, 's k d'], gates: Float[Array, 's k']
) -> Float[Array, 's d']:
  """The sum over a token's experts."""
  return jnp.sum(out * gates[..., None].astype(out.dtype), axis=1)


class _Queues(NamedTuple):
  """Of one device's assignments, sorted by expert, hence by device."""

  order: Int[Array, 'sk']  # the assignment at each place in the queues
  device: Int[Array, 'sk']  # of each assignment's expert
  rank: Int[Array, 'sk']  # of each assignment in its queue
  local: Int[Array, 'sk']  # the expert's number there, by place
  starts: Int[Array, 'p']
  lengths: Int[Array, 'p']


def _sent(config, ragged, x, experts, gates, weights):
  """`dropless` by all_to_all."""
  p, e = jax.lax.axis_size(AXIS), weights.gate.shape[0]
  (s, k), rows = experts.shape, experts.size
  flat = experts.reshape(-1)
  order = jnp.argsort(flat)
  lengths = jnp.bincount(flat // e, length=p)
  starts = jnp.cumsum(lengths) - lengths
  place = jnp.argsort(order)
  rank = place - starts[flat // e]
  queues = _Queues(order, flat // e, rank, flat[order] % e, starts, lengths)
  # A token has at most min(k, e) of its experts on one device.
  longest = s * min(k, e)
  size = min(longest, max(1, math.ceil(config.buffer_factor * rows / p)))
  one_round = functools.partial(_send_round, size, ragged)
  return _rounds(
    one_round, size, longest, jnp.max(lengths), queues, (x, gates), weights
  )


def _send_round(size, ragged, number, queues, inputs, weights):
  """What the assignments say whose turn it is, [s, d]."""
  x, gates = inputs
  (s, k), e = gates.shape, weights.gate.shape[0]
  first = number * size
  turns = first + jnp.arange(size)[None]
  used = turns < queues.lengths[:, None]
  source = jnp.minimum(queues.starts[:, None] + turns, s * k - 1)
  rows = jnp.where(used[..., None], x[queues.order[source] // k], 0)
  names = _all_to_all(jnp.where(used, queues.local[source], e))
  sent = jnp.clip(queues.lengths - first, 0, size)
  if ragged:
    received = _all_to_all(sent)
    carry, back = (
      functools.partial(_ragged, sent=a, received=b)
      for a, b in ((sent, received), (received, sent))
    )
  else:
    carry = back = _all_to_all
  out = experts_lib.dropless(
    carry(rows).reshape(-1, x.shape[1]),
    names.reshape(-1, 1),
    weights,
    partial=True,
  )
  out = back(out.reshape(rows.shape))
  turn = queues.rank - first
  here = (turn >= 0) & (turn < size)
  out = out[queues.device, jnp.where(here, turn, 0)]
  out = jnp.where(here[:, None], out, 0)
  return gated(out.reshape(s, k, -1), gates)


def _gathered(config, x, experts, gates, weights):
  """By all_gather."""
  gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
  e = weights.gate.shape[0]
  local = gather(experts) - e * jax.lax.axis_index(AXIS)
  local = jnp.where((local < 0) | (local >= e), e, local)
  everyone = (gather(x), gather(gates))
  if config.dispatch == 'dropless':
    flat = local.reshape(-1)
    length = jnp.sum(flat < e)
    longest = len(local) * min(local.shape[1], e)
    size = min(longest, math.ceil(config.buffer_factor * experts.size))
    one_round = functools.partial(_local_round, size)
    queue = (jnp.argsort(flat), flat, length)
    out = _rounds(one_round, size, longest, length, queue, everyone, weights)
    dropped = jnp.zeros(())
  else:
    out, dropped = experts_lib.capacity(
      everyone[0], local, weights, slots(config, local)
    )
    out = gated(out, everyone[1])
    dropped = jax.lax.psum(dropped, AXIS)
  out = jax.lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True)
  return out, dropped


def _local_round(size, number, queue, inputs, weights):
  """What this device's experts say to all tokens whose turn it is."""
  (order, experts, length), (x, gates) = queue, inputs
  e, k = weights.gate.shape[0], gates.shape[1]
  turns = number * size + jnp.arange(size)
  used = turns < length
  source = order[jnp.minimum(turns, len(order) - 1)]
  names = jnp.where(used, experts[source], e)
  out = experts_lib.dropless(
    x[source // k], names[:, None], weights, partial=True
  )[:, 0]
  out = out.astype(jnp.float32) * gates.reshape(-1)[source][:, None]
  total = jnp.zeros(x.shape, jnp.float32)
  total = axes.vary(total, axes.over(out)).at[source // k].add(out)
  return total.astype(x.dtype)


def _rounds(one_round, size, longest, length, queues, inputs, weights):
  """The sum over rounds of one_round(number, queues, inputs, weights)."""
  total = one_round(jnp.zeros((), jnp.int32), queues, inputs, weights)
  if longest > size:
    most = jax.lax.pmax(length, AXIS)
    number = axes.vary(-(-most // size), axes.over(total))
    total = total + _further(one_round, number, queues, inputs, weights)
  return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(one_round, number, queues, inputs, weights):
  """The rounds 1 to number - 1; a loop of no trips under an even load."""

  def add(index, total):
    return total + one_round(index, queues, inputs, weights)

  with jax.named_scope(OVERFLOW):
    return jax.lax.fori_loop(1, number, add, jnp.zeros_like(inputs[0]))


def _further_fwd(one_round, *arguments):
  return _further(one_round, *arguments), arguments


def _further_bwd(one_round, kept, g):
  number, queues, inputs, weights = kept

  def add(index, total):
    _, pull = jax.vjp(
      lambda *floats: one_round(index, queues, *floats), inputs, weights
    )
    return jax.tree.map(jnp.add, total, pull(g))

  zeros = jax.tree.map(jnp.zeros_like, (inputs, weights))
  with jax.named_scope(OVERFLOW):
    return None, None, *jax.lax.fori_loop(1, number, add, zeros)


_further.defvjp(_further_fwd, _further_bwd)


def by_capacity(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: experts_lib.Weights,
  slots: int,
) -> tuple[Float[Array, 's k d'], Float[Array, '']]:
  """`experts.capacity` with `slots` rows an expert for each device's tokens."""
  num_devices, num_local = jax.lax.axis_size(AXIS), weights.gate.shape[0]

  def apply(buffer):
    rows = _all_to_all(buffer.reshape(num_devices, num_local, slots, -1))
    rows = jnp.swapaxes(rows, 0, 1).reshape(num_local, -1, x.shape[1])
    out = experts_lib.batched(rows, weights)
    out = out.reshape(num_local, num_devices, slots, -1)
    return _all_to_all(jnp.swapaxes(out, 0, 1)).reshape(buffer.shape)

  num_experts = num_devices * num_local
  return experts_lib.in_slots(x, experts, num_experts, slots, apply)


def slots(config: config_lib.MoEConfig, experts: Int[Array, 's k']) -> int:
  """An expert's rows for these tokens, of dispatch='capacity'.

  No more than there are tokens, each of which chooses an expert once.
  """
  mean = experts.size / config.num_experts
  return min(len(experts), math.ceil(config.capacity_factor * mean))


def _all_to_all(x):
  """x[i] of device j becomes x[j] of device i."""
  return jax.lax.all_to_all(x, AXIS, 0, 0, tiled=True)


def _ragged(rows, sent, received):
  """`_all_to_all` of the first sent[i] rows of each rows[i], the others 0."""
  num_devices, size, dim = rows.shape
  places = jnp.arange(num_devices, dtype=jnp.int32) * size
  here = jnp.full(num_devices, jax.lax.axis_index(AXIS) * size, jnp.int32)
  flat = rows.reshape(-1, dim)
  flat = jax.lax.ragged_all_to_all(
    flat,
    axes.vary(jnp.zeros(flat.shape, flat.dtype), axes.over(flat)),
    *axes.together(
      places, sent.astype(jnp.int32), here, received.astype(jnp.int32)
    ),
    axis_name=AXIS,
  )
  return flat.reshape(rows.shape)
