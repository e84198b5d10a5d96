r"""Tokens to the devices of their experts, and the results back.

The experts of a layer are split over the p devices of the mesh axis `AXIS`, e
of them each, and so are the tokens. A device that has s tokens with k experts
each sorts these s k assignments by expert, which sorts them by device, and
sends every device a buffer of q rows,

    q = factor s k / p,

what is left of a longer queue in another round. The number of rounds is that of
the group's longest queue, so that an even load takes one and nothing is lost
under any. A round is recomputed for its gradient, the first excepted.

Two transports have the same result. `padded` is `all_to_all` of whole buffers;
`ragged` is `ragged_all_to_all`, which leaves the unused rows at home, on
platforms that have it. With a capacity (`by_capacity`) an expert has the same
number of rows for each of the devices, the rest is dropped, and there is
nothing to sort on arrival.

A third, `gathered`, sends every token to every device instead and adds up what
they say: 2 (p - 1) rows a token, against 2 k (p - 1) / p.
"""

from collections.abc import Callable
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import axes
from mhc import experts as experts_lib
from mhc import recompute
from mhc.kernels import target

AXIS = experts_lib.AXIS
# Names the conditional around a further round in the compiled program.
OVERFLOW = 'overflow'


def transport(
  name: Literal['auto', 'ragged', 'padded', 'gather'],
) -> Literal['ragged', 'padded', 'gather']:
  """What `auto` stands for on the platform at hand."""
  if name != 'auto':
    return name
  return 'padded' if target.platform() == 'cpu' else 'ragged'


def dropless(
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  weights: experts_lib.Weights,
  *,
  factor: float,
  ragged: bool,
) -> Float[Array, 's k d']:
  """`experts.dropless` with experts on other devices.

  Args:
    x: this device's tokens.
    experts: their experts, numbered over the group.
    weights: of this device's experts.
    factor: rows of a buffer over the mean, see above.
    ragged: sends the used rows only.
  """
  num_devices, num_local = jax.lax.axis_size(AXIS), weights.gate.shape[0]
  num_rows, k = experts.size, experts.shape[1]
  flat = experts.reshape(-1)
  order = jnp.argsort(flat)
  device, local = flat[order] // num_local, flat[order] % num_local
  queues = jnp.bincount(device, length=num_devices)
  starts = jnp.cumsum(queues) - queues
  rank = jnp.arange(num_rows) - starts[device]
  # A token has at most min(k, e) of its experts on one device.
  longest = num_rows // k * min(k, num_local)
  size = min(longest, max(1, math.ceil(factor * num_rows / num_devices)))

  def one_round(number, x, weights):
    """The outputs of the assignments whose turn it is, the others 0."""
    first = number * size
    slots = first + jnp.arange(size)[None]
    source = jnp.minimum(starts[:, None] + slots, num_rows - 1)
    used = slots < queues[:, None]
    rows = jnp.where(used[..., None], x[order[source] // k], 0)
    names = jnp.where(used, local[source], num_local)
    sent = jnp.clip(queues - first, 0, size)
    received = _all_to_all(sent)
    carry = (
      _ragged if ragged else lambda rows, sent, received: _all_to_all(rows)
    )
    names = _all_to_all(names)
    out = experts_lib.dropless(
      carry(rows, sent, received).reshape(-1, x.shape[1]),
      names.reshape(-1, 1),
      weights,
      partial=True,
    )
    back = carry(out.reshape(rows.shape), received, sent)
    mine = (rank >= first) & (rank < first + size)
    back = back[device, jnp.where(mine, rank - first, 0)]
    return jnp.where(mine[:, None], back, 0)

  total = one_round(0, x, weights)
  rounds = -(-longest // size)
  if rounds > 1:
    most = jax.lax.pmax(jnp.max(queues), AXIS)

    def further(total, number):
      @recompute.lean
      def add(total, x, weights):
        return total + one_round(number, x, weights)

      with jax.named_scope(OVERFLOW):
        total = jax.lax.cond(
          number * size < most,
          add,
          lambda total, *_: total,
          total,
          x,
          weights,
        )
      return total, None

    total, _ = jax.lax.scan(further, total, jnp.arange(1, rounds))
  return total[jnp.argsort(order)].reshape(-1, k, x.shape[1])


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


def gathered(
  apply: Callable,
  x: Float[Array, 's d'],
  experts: Int[Array, 's k'],
  gates: Float[Array, 's k'],
  num_local: int,
) -> tuple[Float[Array, 's d'], Float[Array, '']]:
  """Applies the experts of every device to the tokens of the whole group.

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
