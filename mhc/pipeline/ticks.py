"""One tick of a pipeline: the step of the scan over a schedule's table.

`executor` says what a tick consists of. A tick is called with the carry and the
row of the table; its branches are methods, which take what they need as
operands. The scopes by which the branches are found in the compiled program are
those of `branch_frequencies`.
"""

import abc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc.model import parts
from mhc.pipeline import buffers
from mhc.pipeline import table

Tree = Any


class Gradients(NamedTuple):
  """Sums over a device's microbatches, not yet over devices."""

  nats: Float[Array, '']
  blocks: Tree  # [v r, ...] float32
  shared: Tree  # float32
  stats: Tree  # of each block, [v r, ...]


class ForwardTick:
  """One tick of a schedule without B: the step of a `jax.lax.scan`."""

  def __init__(self, schedule, device):
    self.schedule, self.device = schedule, device

  def start(self):
    """Inputs of stages, what the head takes, statistics."""
    schedule, device = self.schedule, self.device
    num = schedule.num_microbatches
    stats = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (schedule.num_chunks, leaf.shape[0], num, *leaf.shape[1:]), leaf.dtype
      ),
      device.stats,
    )
    return (
      buffers.filled(device.state, 0, max(1, schedule.num_slots)),
      buffers.filled(device.hidden, 0, num),
      buffers.filled(stats, 0),
    )

  def __call__(self, carry, row):
    my = buffers.device_row(row)
    inputs, hidden, stats = carry
    x = buffers.read_slot(inputs, my['f_slot'])
    y, hidden, stats = jax.lax.cond(
      my['f_chunk'] >= 0, self._stage, self._idle, my, x, hidden, stats
    )
    sent = buffers.permute(y, 'act', self.schedule)
    inputs = buffers.store_received(inputs, 'act', my, y, sent, self.schedule)
    return (inputs, hidden, stats), None

  def _stage(self, my, x, hidden, stats):
    chunk, index = my['f_chunk'], my['f_mb']
    y, _, new = self.device.run(my, x)
    hidden = jax.lax.cond(
      my['f_last'] == 1, self._close, keep, hidden, index, y
    )
    stats = jax.tree.map(
      lambda all, one: all.at[chunk, :, index].set(one), stats, new
    )
    return y, hidden, stats

  def _close(self, hidden, index, y):
    return buffers.write_slot(hidden, index, self.device.close(y))

  def _idle(self, my, x, hidden, stats):
    del my, x
    return buffers.filled(self.device.state, 0), hidden, stats


class TrainingTick(abc.ABC):
  """One tick of a schedule with F and B: the step of a `jax.lax.scan`.

  What F keeps for B is left to the subclasses, in `keeping`.
  """

  def __init__(self, schedule, device):
    self.schedule, self.device = schedule, device
    self.head_is_split = schedule.head == 'vocab'

  def start(self):
    """Inputs of stages, gradients, of the head, kept, of the last B, sums."""
    schedule, device = self.schedule, self.device
    total = Gradients(
      buffers.filled(jax.ShapeDtypeStruct((), jnp.float32), 0),
      *(
        buffers.filled(jax.tree.map(_float32, tree), 0)
        for tree in (device.stack[0], device.shared)
      ),
      buffers.filled(device.stats, 0, schedule.num_chunks),
    )
    return (
      buffers.unused(device.state, max(1, schedule.num_slots)),
      buffers.unused(device.state, max(1, schedule.num_grad_slots)),
      buffers.unused(device.hidden, max(1, schedule.num_head_slots)),
      self.kept(),
      buffers.unused(device.state),
      total,
    )

  @abc.abstractmethod
  def kept(self):
    """The buffers of what F keeps for B beside the input."""

  def __call__(self, carry, row):
    schedule = self.schedule
    my = buffers.device_row(row)
    inputs, grads, head_grads, kept, dx, total = carry
    arrived = buffers.permute(dx, 'grad', schedule)
    grads = buffers.store_received(grads, 'grad', my, dx, arrived, schedule)
    # Read before the buffer is handed on, or XLA would copy all of it.
    x_f = buffers.read_slot(inputs, my['f_slot'])
    x_b = buffers.read_slot(inputs, my['b_slot'])
    inputs, x_f, x_b = jax.lax.optimization_barrier((inputs, x_f, x_b))
    y, h, kept, total = self.forward(my, x_f, kept, total)
    sent = buffers.permute(y, 'act', schedule)
    dh = None
    if self.head_is_split:
      head_grads, total = cond(
        'head',
        row['head_mb'] >= 0,
        self._split_head,
        keep_two,
        head_grads,
        total,
        h,
        row,
      )
      dh = buffers.read_slot(head_grads, my['b_head_slot'])
    incoming = buffers.read_slot(grads, my['b_grad_slot'])
    dx, total = self.backward(my, x_b, kept, incoming, dh, total)
    inputs = buffers.store_received(inputs, 'act', my, y, sent, schedule)
    return (inputs, grads, head_grads, kept, dx, total), None

  @abc.abstractmethod
  def forward(self, my, x, kept, total):
    """F or nothing: the output, what the head takes, what is kept, sums."""

  @abc.abstractmethod
  def backward(self, my, x, kept, incoming, dh, total):
    """B or nothing: the gradient of the stage's input, and sums."""

  def closed(self, my, y):
    """What a split head takes, of the last stage."""
    if not self.head_is_split:
      return None
    last = my['f_last'] == 1
    return cond('f_last', last, self.device.close, self._no_hidden, y)

  def idle(self, my, x):
    del my, x
    h = buffers.unused(self.device.hidden) if self.head_is_split else None
    return buffers.unused(self.device.state), h

  def _no_hidden(self, y):
    del y
    return buffers.unused(self.device.hidden)

  def _head(self, h, index, total):
    """The loss of microbatch `index` at h, and its gradient at h."""
    device = self.device
    loss_and_grads = jax.value_and_grad(device.summed_nats, (0, 1))
    nats, (d_shared, dh) = loss_and_grads(device.shared, h, index)
    return nats, dh, total._replace(shared=_add(total.shared, d_shared))

  def _split_head(self, head_grads, total, h, row):
    h = buffers.broadcast_from_last(h, self.schedule)
    nats, dh, total = self._head(h, row['head_mb'], total)
    nats = jnp.where(buffers.is_last(self.schedule), nats, 0)
    head_grads = buffers.write_slot(head_grads, row['head_slot'], dh)
    return head_grads, _plus_nats(total, nats)

  def at_the_end(self, my, incoming, total, y, dh):
    """The gradient of a stage's output, of the last one through the head."""
    return cond(
      'b_last',
      my['b_last'] == 1,
      self._through_the_head,
      keep_two,
      incoming,
      total,
      my['b_mb'],
      y,
      dh,
    )

  def at_the_start(self, my, dx, total):
    """The gradient of a stage's input; of the first one also into the sums."""
    shared = cond(
      'b_first',
      my['b_first'] == 1,
      self._into_the_embedding,
      keep,
      total.shared,
      my['b_mb'],
      dx,
    )
    return dx, total._replace(shared=shared)

  def no_backward(self, total, *_):
    return buffers.unused(self.device.state), total

  def _through_the_head(self, incoming, total, index, y, dh):
    """The gradient of the last stage's output, through close and head."""
    del incoming
    device = self.device
    h, pull_back = jax.vjp(device.stages.close, device.shared, y)
    if not self.head_is_split:
      nats, dh, total = self._head(h, index, total)
      total = _plus_nats(total, nats)
    d_shared, dy = pull_back(dh)
    return dy, total._replace(shared=_add(total.shared, d_shared))

  def _into_the_embedding(self, d_shared, index, dx):
    """The gradient of the embedding, added."""
    device = self.device
    _, pull_back = jax.vjp(
      lambda shared: device.embed(shared, index), device.shared
    )
    return _add(d_shared, pull_back(dx)[0])


def branch_frequencies(schedule: table.Schedule) -> dict[str, float]:
  """How often the branches are taken, by the scope around them.

  A fraction of the ticks, by whichever device: a tick is as long as its
  longest, because the devices wait for each other. Inside of F and B, of their
  ticks.
  """

  def ticks(column, least):
    taken = schedule.table[column] >= least
    return taken.any(axis=1).sum() if taken.ndim > 1 else taken.sum()

  return _frequencies(schedule, ticks)


def device_frequencies(schedule: table.Schedule) -> dict[str, float]:
  """`branch_frequencies` of one device, the mean of all: it idles otherwise."""

  def ticks(column, least):
    taken = schedule.table[column] >= least
    return taken.mean(axis=1).sum() if taken.ndim > 1 else taken.sum()

  return _frequencies(schedule, ticks)


def _frequencies(schedule, ticks):
  """From the number of ticks in which a column is at least something."""
  found = {'head': ticks('head_mb', 0) / schedule.num_ticks}
  for op in 'fb':
    number = ticks(f'{op}_chunk', 0)
    found[op] = number / schedule.num_ticks
    for end in ('first', 'last'):
      found[f'{op}_{end}'] = ticks(f'{op}_{end}', 1) / max(1, number)
  return {f'pipeline_{name}': float(value) for name, value in found.items()}


def cond(name, *arguments):
  """`jax.lax.cond`, to be found in the compiled program by its scope."""
  with jax.named_scope(f'pipeline_{name}'):
    return jax.lax.cond(*arguments)


def loop(name, once, body, carry):
  """`body` of the carry if `once`, else the carry, which is never copied."""
  with jax.named_scope(f'pipeline_{name}'):
    return jax.lax.fori_loop(
      0, once.astype(jnp.int32), lambda _, carry: body(carry), carry
    )


def keep(same, *_):
  """The branch that changes nothing."""
  return same


def keep_two(one, other, *_):
  """The branch that changes neither."""
  return one, other


def _plus_nats(total, nats):
  return total._replace(nats=total.nats + nats)


@parts.part(parts.ACCUMULATION)
def _add(total, part):
  return jax.tree.map(_accumulate, total, part)


def _accumulate(total, part):
  return total + part.astype(total.dtype)


@parts.part(parts.ACCUMULATION)
def add_at(total, chunk, part):
  return jax.tree.map(
    lambda a, b: a.at[chunk].add(b.astype(a.dtype)), total, part
  )


def _float32(leaf):
  """The shape of a sum."""
  return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
