"""Runs a schedule of pipeline stages inside a `shard_map`.

Every device runs the same program, a scan over the ticks of a static table
(`table`), each tick as follows.

    1. gradients that left a stage in the last tick arrive and are stored
    2. F: one stage forward for one microbatch, or nothing
    3. its output sets out for the next stage
    4. the head, where the vocabulary is split over the stages
    5. B: one stage's gradient for one microbatch, or nothing
    6. what set out in 3 is stored

F does not wait for the transfer of 1, nor B for that of 3: both travel while
something is computed. B computes its stage again from the stage's input, which
is all that is kept of a microbatch between F and B, and takes the gradient by
`jax.vjp` under the model's recompute policy. The first stage embeds its tokens
again instead of keeping anything; the last has its forward pass in B only.

Collectives over `PIPE` stand outside the branches: a device that is idle must
take part. Inside a branch there are only those over other axes, whose groups
take the same branch. Everything that enters a branch varies over all axes, so
that autodiff puts no sum over devices there.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc import axes
from mhc.pipeline import buffers
from mhc.pipeline import table

Tree = Any


@runtime_checkable
class Stages(Protocol):
  """What a pipeline computes; c rows of t tokens are a microbatch."""

  def embed(self, shared, tokens):
    """Tokens int32 [c, t] -> state, what the first stage takes."""

  def run(self, blocks, bias, is_real, state):
    """One stage: state, what else it adds to the objective, statistics.

    `blocks` [r, ...], `bias` [r, e] or None, `is_real` bool [r] or None.
    """

  def close(self, shared, state):
    """State -> h [c t, d], what the head takes."""

  def score(self, shared, h, targets):
    """The nats, float32 [c], of targets int32 [c, t].

    With head='vocab' of a vocabulary that is split over PIPE: called by all
    devices at once.
    """


class Parts(NamedTuple):
  """What one device has, inside a `shard_map`."""

  blocks: Tree  # its rows of the stack, [v r, ...], see `stage_layout`
  bias: Float[Array, 'vr e'] | None  # of the router, with experts
  is_real: Bool[Array, 'vr'] | None  # which rows are blocks; None for all
  shared: Tree  # every other parameter
  tokens: Int[Array, 'm c t1']  # t + 1 of a row, inputs and targets


class Gradients(NamedTuple):
  """Sums over a device's microbatches, not yet over devices."""

  nats: Float[Array, '']
  blocks: Tree  # [v r, ...] float32
  shared: Tree  # float32
  stats: Tree  # of each block, [v r, ...]


def gradients(
  schedule: table.Schedule, stages: Stages, parts: Parts
) -> Gradients:
  """The gradient of the summed loss of a device's microbatches.

  Args:
    schedule: for as many microbatches and the devices of the axis PIPE.
    stages: the functions.
    parts: what they are applied to.
  """
  device = _Device(schedule, stages, parts)
  tick = _TrainingTick(schedule, device)
  total = jax.lax.scan(tick, tick.start(), buffers.table_rows(schedule))[0][-1]
  return total._replace(
    blocks=_by_layer(total.blocks), stats=_by_layer(total.stats)
  )


def forward(
  schedule: table.Schedule, stages: Stages, parts: Parts
) -> tuple[Float[Array, 'm c'], Tree]:
  """The summed loss of every row, and what the blocks say of it.

  Args:
    schedule: of `table.build_forward`.
    stages, parts: as for `gradients`.

  Returns:
    nats, on every device of PIPE; and the statistics of `stages.run` of each
    microbatch at each block of this device, [v r, m, ...].
  """
  device = _Device(schedule, stages, parts)
  tick = _ForwardTick(schedule, device)
  carry, _ = jax.lax.scan(tick, tick.start(), buffers.table_rows(schedule))
  _, hidden, stats = carry
  hidden = buffers.broadcast_from_last(hidden, schedule)
  microbatches = jnp.arange(schedule.num_microbatches)
  nats = jax.lax.map(
    lambda index: device.score(buffers.index(hidden, index), index),
    microbatches,
  )
  return nats, _by_layer(stats)


class _Device:
  """The stages' functions on one device's parts, all varying over all axes."""

  def __init__(self, schedule, stages, parts):
    parts = axes.cast_varying_everywhere(parts)
    self.stages = stages
    stack = (parts.blocks, parts.bias, parts.is_real)
    self.stack = _by_chunk(stack, schedule.num_chunks)
    self.shared = parts.shared
    self.tokens = parts.tokens
    self.state = jax.eval_shape(self.embed, self.shared, 0)
    self.hidden = jax.eval_shape(self.close, self.state)
    self.stats = jax.eval_shape(self.first_chunk, self.state)[2]

  def chunk(self, number):
    """A stage's blocks, biases and `is_real`."""
    return buffers.read_slot(self.stack, number)

  def first_chunk(self, state):
    return self.stages.run(*self.chunk(0), state)

  def embed(self, shared, index):
    tokens = buffers.index(self.tokens, index)
    return self.stages.embed(shared, tokens[:, :-1])

  def stage_input(self, my, op, x):
    """The input of the F or B at hand: x, or anew from tokens."""
    return _cond(
      f'{op}_first',
      my[f'{op}_first'] == 1,
      self._embed_instead,
      _keep,
      x,
      my[f'{op}_mb'],
    )

  def run(self, my, op, x):
    chunk = self.chunk(my[f'{op}_chunk'])
    return self.stages.run(*chunk, self.stage_input(my, op, x))

  def close(self, y):
    return self.stages.close(self.shared, y)

  def score(self, h, index):
    return self.nats(self.shared, h, index)

  def nats(self, shared, h, index):
    tokens = buffers.index(self.tokens, index)
    return self.stages.score(shared, h, tokens[:, 1:])

  def summed_nats(self, shared, h, index):
    return jnp.sum(self.nats(shared, h, index))

  def _embed_instead(self, x, index):
    del x
    return self.embed(self.shared, index)


class _ForwardTick:
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
    y, _, new = self.device.run(my, 'f', x)
    hidden = jax.lax.cond(
      my['f_last'] == 1, self._close, _keep, hidden, index, y
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


class _TrainingTick:
  """One tick of a schedule with F and B: the step of a `jax.lax.scan`."""

  def __init__(self, schedule, device):
    self.schedule, self.device = schedule, device
    self.head_is_split = schedule.head == 'vocab'

  def start(self):
    """Inputs of stages, gradients, those of the head, of the last B, sums."""
    schedule, device = self.schedule, self.device
    total = Gradients(
      buffers.filled(jax.ShapeDtypeStruct((), jnp.float32), 0),
      *(
        buffers.filled(_float32(tree), 0)
        for tree in (device.stack[0], device.shared)
      ),
      buffers.filled(device.stats, 0, schedule.num_chunks),
    )
    return (
      buffers.unused(device.state, max(1, schedule.num_slots)),
      buffers.unused(device.state, max(1, schedule.num_grad_slots)),
      buffers.unused(device.hidden, max(1, schedule.num_head_slots)),
      buffers.unused(device.state),
      total,
    )

  def __call__(self, carry, row):
    schedule = self.schedule
    my = buffers.device_row(row)
    inputs, grads, head_grads, dx, total = carry
    arrived = buffers.permute(dx, 'grad', schedule)
    grads = buffers.store_received(grads, 'grad', my, dx, arrived, schedule)
    # Read before the buffer is handed on, or XLA would copy all of it.
    x_f = buffers.read_slot(inputs, my['f_slot'])
    x_b = buffers.read_slot(inputs, my['b_slot'])
    inputs, x_f, x_b = jax.lax.optimization_barrier((inputs, x_f, x_b))
    y, h = _cond('f', my['f_chunk'] >= 0, self._forward, self._idle, my, x_f)
    sent = buffers.permute(y, 'act', schedule)
    dh = None
    if self.head_is_split:
      head_grads, total = _cond(
        'head',
        row['head_mb'] >= 0,
        self._split_head,
        _keep_two,
        head_grads,
        total,
        h,
        row,
      )
      dh = buffers.read_slot(head_grads, my['b_head_slot'])
    incoming = buffers.read_slot(grads, my['b_grad_slot'])
    dx, total = _cond(
      'b',
      my['b_chunk'] >= 0,
      self._backward,
      self._no_backward,
      total,
      my,
      x_b,
      incoming,
      dh,
    )
    inputs = buffers.store_received(inputs, 'act', my, y, sent, schedule)
    return (inputs, grads, head_grads, dx, total), None

  def _forward(self, my, x):
    """F: the stage's output and, for a split head, what the head takes."""
    y = self.device.run(my, 'f', x)[0]
    if not self.head_is_split:
      return y, None
    h = _cond(
      'f_last', my['f_last'] == 1, self.device.close, self._no_hidden, y
    )
    return y, h

  def _idle(self, my, x):
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

  def _backward(self, total, my, x, incoming, dh):
    """B: the gradient of the stage's input; the totals with its share."""
    device, chunk = self.device, my['b_chunk']
    x = device.stage_input(my, 'b', x)
    weights, bias, is_real = device.chunk(chunk)

    def stage(weights, x):
      y, extra, stats = device.stages.run(weights, bias, is_real, x)
      return (y, extra), stats

    (y, extra), pull_back, stats = jax.vjp(stage, weights, x, has_aux=True)
    dy, total = _cond(
      'b_last',
      my['b_last'] == 1,
      self._at_the_end,
      _keep_two,
      incoming,
      total,
      my['b_mb'],
      y,
      dh,
    )
    d_weights, dx = pull_back((dy, jnp.ones_like(extra)))
    d_shared = _cond(
      'b_first',
      my['b_first'] == 1,
      self._at_the_start,
      _keep,
      total.shared,
      my['b_mb'],
      dx,
    )
    return dx, Gradients(
      total.nats,
      _add_at(total.blocks, chunk, d_weights),
      d_shared,
      _add_at(total.stats, chunk, stats),
    )

  def _no_backward(self, total, *_):
    return buffers.unused(self.device.state), total

  def _at_the_end(self, incoming, total, index, y, dh):
    """The gradient of the last stage's output, through close and head."""
    del incoming
    device = self.device
    h, pull_back = jax.vjp(device.stages.close, device.shared, y)
    if not self.head_is_split:
      nats, dh, total = self._head(h, index, total)
      total = _plus_nats(total, nats)
    d_shared, dy = pull_back(dh)
    return dy, total._replace(shared=_add(total.shared, d_shared))

  def _at_the_start(self, d_shared, index, dx):
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
  found = {'head': _ticks(schedule, 'head_mb', 0) / schedule.num_ticks}
  for op in 'fb':
    number = _ticks(schedule, f'{op}_chunk', 0)
    found[op] = number / schedule.num_ticks
    for end in ('first', 'last'):
      found[f'{op}_{end}'] = _ticks(schedule, f'{op}_{end}', 1) / max(1, number)
  return {f'pipeline_{name}': float(value) for name, value in found.items()}


def _ticks(schedule, column, least):
  taken = schedule.table[column] >= least
  return taken.any(axis=1).sum() if taken.ndim > 1 else taken.sum()


def _cond(name, *arguments):
  """`jax.lax.cond`, to be found in the compiled program by its scope."""
  with jax.named_scope(f'pipeline_{name}'):
    return jax.lax.cond(*arguments)


def _keep(same, *_):
  """The branch that changes nothing."""
  return same


def _keep_two(one, other, *_):
  return one, other


def _plus_nats(total, nats):
  return total._replace(nats=total.nats + nats)


def _add(total, part):
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _add_at(total, chunk, part):
  return jax.tree.map(
    lambda a, b: a.at[chunk].add(b.astype(a.dtype)), total, part
  )


def _by_chunk(tree, num_chunks):
  """[v r, ...] -> [v, r, ...]."""
  return jax.tree.map(
    lambda leaf: leaf.reshape(num_chunks, -1, *leaf.shape[1:]), tree
  )


def _by_layer(tree):
  """[v, r, ...] -> [v r, ...]."""
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _float32(tree):
  """Shapes for sums."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), tree
  )
