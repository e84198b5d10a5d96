"""Runs a schedule of pipeline stages inside a `shard_map`.

Every device runs the same program, a scan over the ticks of a static table
(`schedule`), each tick as follows.

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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc.parallel import mesh as mesh_lib
from mhc.pipeline import buffers as buffers_lib
from mhc.pipeline import table as table_lib

PIPE = mesh_lib.PIPE
Tree = Any


class Stages(NamedTuple):
  """What a pipeline computes; c rows of t tokens are a microbatch.

  open: shared, tokens int32 [c, t] -> state, what the first stage takes.
  run: blocks [r, ...], bias [r, e] or None, active bool [r], state ->
    state, what else the blocks add to the objective, statistics.
  close: shared, state -> h [c t, d], what the head takes.
  score: shared, h, targets int32 [c, t] -> nats float32 [c]. With head='vocab'
    of a vocabulary that is split over PIPE: called by all devices at once.
  """

  open: Callable
  run: Callable
  close: Callable
  score: Callable


class Parts(NamedTuple):
  """What one device has, inside a `shard_map`."""

  blocks: Tree  # its rows of the stack, [v r, ...], see `layout`
  bias: Float[Array, 'vr e'] | None  # of the router, with experts
  active: Bool[Array, 'vr'] | None  # which rows are blocks; None for all
  shared: Tree  # every other parameter
  tokens: Int[Array, 'm c t1']  # t + 1 of a row, inputs and targets


class Gradients(NamedTuple):
  """Sums over a device's microbatches, not yet over devices."""

  nats: Float[Array, '']
  blocks: Tree  # [v r, ...] float32
  shared: Tree  # float32
  stats: Tree  # of each block, [v r, ...]


def gradients(
  schedule: table_lib.Schedule,
  stages: Stages,
  parts: Parts,
  *,
  pollute: bool = False,
) -> Gradients:
  """The gradient of the summed loss of a device's microbatches.

  Args:
    schedule: for as many microbatches and the devices of the axis PIPE.
    stages: the functions.
    parts: what they are applied to.
    pollute: fill every buffer and the output of every idle device with NaN,
      to test that nothing of it is used.
  """
  do = _Local(schedule, stages, parts)
  empty = jnp.nan if pollute else 0

  def fresh(shapes, *extra):
    return buffers_lib.full(shapes, empty, *extra)

  def forward(my, x):
    """F: the stage's output and, for a split head, what the head takes."""

    def run():
      y = do.run(my, 'f', x)[0]
      if schedule.head == 'last':
        return y, None
      return y, _cond(
        'f_last',
        my['f_last'] == 1,
        lambda: do.close(y),
        lambda: fresh(do.hidden),
      )

    def idle():
      h = None if schedule.head == 'last' else fresh(do.hidden)
      return fresh(do.state), h

    return _cond('f', my['f_chunk'] >= 0, run, idle)

  def head(h, index, total):
    """The loss of microbatch `index` at h, and its gradient at h."""

    def loss(shared, h):
      return jnp.sum(do.score(shared, h, index))

    nats, (d_shared, dh) = jax.value_and_grad(loss, (0, 1))(do.shared, h)
    return nats, dh, total._replace(shared=_add(total.shared, d_shared))

  def split_head(h, hs, row, total):
    h = buffers_lib.from_last(h, schedule)
    nats, dh, total = head(h, row['h_mb'], total)
    nats = jnp.where(buffers_lib.is_last(schedule), nats, 0)
    return buffers_lib.put(hs, row['h_slot'], dh), _plus(total, nats)

  def backward(my, x, incoming, dh, total):
    """B: the gradient of the stage's input; the totals with its share."""

    def run():
      chunk, index = my['b_chunk'], my['b_mb']
      x_ = do.start(my, 'b', x)
      weights, bias, active = do.chunk(chunk)

      def stage(weights, x):
        y, extra, stats = stages.run(weights, bias, active, x)
        return (y, extra), stats

      (y, extra), pull, stats = jax.vjp(stage, weights, x_, has_aux=True)

      def at_the_end(total):
        h, pull = jax.vjp(stages.close, do.shared, y)
        if schedule.head == 'vocab':
          d_shared, dy = pull(dh)
        else:
          nats, dh_, total = head(h, index, total)
          total = _plus(total, nats)
          d_shared, dy = pull(dh_)
        return dy, total._replace(shared=_add(total.shared, d_shared))

      dy, sums = _cond(
        'b_last',
        my['b_last'] == 1,
        at_the_end,
        lambda total: (incoming, total),
        total,
      )
      d_weights, dx = pull((dy, jnp.ones_like(extra)))

      def at_the_start(d_shared):
        _, pull = jax.vjp(lambda shared: do.open(shared, index), do.shared)
        return _add(d_shared, pull(dx)[0])

      d_shared = _cond(
        'b_first',
        my['b_first'] == 1,
        at_the_start,
        lambda same: same,
        sums.shared,
      )
      return dx, Gradients(
        sums.nats,
        _add_at(sums.blocks, chunk, d_weights),
        d_shared,
        _add_at(sums.stats, chunk, stats),
      )

    return _cond('b', my['b_chunk'] >= 0, run, lambda: (fresh(do.state), total))

  def tick(carry, row):
    my = buffers_lib.mine(row)
    xs, gs, hs, dx, total = carry
    arrived = buffers_lib.send(dx, 'grad', schedule)
    gs = buffers_lib.store(gs, 'rg', my, dx, arrived, schedule)
    # Read before the buffer is handed on, or XLA would copy all of it.
    x_f, x_b = (
      buffers_lib.slot(xs, my['f_slot']),
      buffers_lib.slot(xs, my['b_slot']),
    )
    xs, x_f, x_b = jax.lax.optimization_barrier((xs, x_f, x_b))
    y, h = forward(my, x_f)
    sent = buffers_lib.send(y, 'act', schedule)
    dh = None
    if schedule.head == 'vocab':
      hs, total = _cond(
        'h',
        row['h_mb'] >= 0,
        lambda: split_head(h, hs, row, total),
        lambda: (hs, total),
      )
      dh = buffers_lib.slot(hs, my['b_hslot'])
    dx, total = backward(
      my, x_b, buffers_lib.slot(gs, my['b_gslot']), dh, total
    )
    xs = buffers_lib.store(xs, 'ra', my, y, sent, schedule)
    return (xs, gs, hs, dx, total), None

  total = Gradients(
    buffers_lib.full(jax.ShapeDtypeStruct((), jnp.float32), 0),
    *(buffers_lib.full(_wide(tree), 0) for tree in (do.stack[0], do.shared)),
    buffers_lib.full(do.stats, 0, schedule.num_chunks),
  )
  buffers = (
    fresh(do.state, max(1, schedule.num_slots)),
    fresh(do.state, max(1, schedule.num_grad_slots)),
    fresh(do.hidden, max(1, schedule.num_head_slots)),
  )
  carry = (*buffers, fresh(do.state), total)
  total = jax.lax.scan(tick, carry, buffers_lib.rows(schedule))[0][-1]
  return total._replace(
    blocks=_by_row(total.blocks), stats=_by_row(total.stats)
  )


def forward(
  schedule: table_lib.Schedule, stages: Stages, parts: Parts
) -> tuple[Float[Array, 'm c'], Tree]:
  """The summed loss of every row, and what the blocks say of it.

  Args:
    schedule: of `schedule.build_forward`.
    stages, parts: as for `gradients`.

  Returns:
    nats, on every device of PIPE; and the statistics of `stages.run` of each
    microbatch at each block of this device, [v r, m, ...].
  """
  do = _Local(schedule, stages, parts)
  num = schedule.num_microbatches

  def tick(carry, row):
    my = buffers_lib.mine(row)
    xs, hs, kept = carry
    x = buffers_lib.slot(xs, my['f_slot'])

    def run():
      chunk, index = my['f_chunk'], my['f_mb']
      y, _, stats = do.run(my, 'f', x)
      closed = jax.lax.cond(
        my['f_last'] == 1,
        lambda: buffers_lib.put(hs, index, do.close(y)),
        lambda: hs,
      )
      add = lambda kept, one: kept.at[chunk, :, index].set(one)
      return y, closed, jax.tree.map(add, kept, stats)

    y, hs, kept = jax.lax.cond(
      my['f_chunk'] >= 0, run, lambda: (buffers_lib.full(do.state, 0), hs, kept)
    )
    sent = buffers_lib.send(y, 'act', schedule)
    xs = buffers_lib.store(xs, 'ra', my, y, sent, schedule)
    return (xs, hs, kept), None

  carry = (
    buffers_lib.full(do.state, 0, max(1, schedule.num_slots)),
    buffers_lib.full(do.hidden, 0, num),
    jax.tree.map(
      lambda leaf: buffers_lib.full(
        jax.ShapeDtypeStruct(
          (schedule.num_chunks, leaf.shape[0], num, *leaf.shape[1:]), leaf.dtype
        ),
        0,
      ),
      do.stats,
    ),
  )
  (_, hs, kept), _ = jax.lax.scan(tick, carry, buffers_lib.rows(schedule))
  hs = buffers_lib.from_last(hs, schedule)
  nats = jax.lax.map(
    lambda index: do.score(do.shared, buffers_lib.take(hs, index), index),
    jnp.arange(num),
  )
  return nats, _by_row(kept)


class _Local:
  """The stages' functions on one device's parts, all varying over all axes."""

  def __init__(self, schedule, stages, parts):
    parts = mesh_lib.varying(parts)
    self.stages = stages
    self.stack = jax.tree.map(
      lambda leaf: leaf.reshape(schedule.num_chunks, -1, *leaf.shape[1:]),
      (parts.blocks, parts.bias, parts.active),
    )
    self.shared = parts.shared
    self.tokens = parts.tokens
    self.state = jax.eval_shape(self.open, self.shared, 0)
    self.hidden = jax.eval_shape(self.close, self.state)
    run = lambda x: stages.run(*self.chunk(0), x)[2]
    self.stats = jax.eval_shape(run, self.state)

  def chunk(self, index):
    return jax.tree.map(lambda leaf: buffers_lib.take(leaf, index), self.stack)

  def open(self, shared, index):
    return self.stages.open(
      shared, buffers_lib.take(self.tokens, index)[:, :-1]
    )

  def start(self, my, op, x):
    """The input of the F or B at hand: x, or anew from tokens."""
    return _cond(
      f'{op}_first',
      my[f'{op}_first'] == 1,
      lambda: self.open(self.shared, my[f'{op}_mb']),
      lambda: x,
    )

  def run(self, my, op, x):
    return self.stages.run(
      *self.chunk(my[f'{op}_chunk']), self.start(my, op, x)
    )

  def close(self, y):
    return self.stages.close(self.shared, y)

  def score(self, shared, h, index):
    return self.stages.score(
      shared, h, buffers_lib.take(self.tokens, index)[:, 1:]
    )


def shares(schedule: table_lib.Schedule) -> dict[str, float]:
  """How often the branches are taken, by the scope around them.

  Of the ticks, by whichever device: a tick is as long as its longest, because
  the devices wait for each other. Inside of F and B, of their ticks.
  """
  table = schedule.table

  def ticks(column, least):
    taken = table[column] >= least
    return taken.any(axis=1).sum() if taken.ndim > 1 else taken.sum()

  times = {'h': ticks('h_mb', 0) / schedule.num_ticks}
  for op in 'fb':
    number = ticks(f'{op}_chunk', 0)
    times[op] = number / schedule.num_ticks
    for end in ('first', 'last'):
      times[f'{op}_{end}'] = ticks(f'{op}_{end}', 1) / max(1, number)
  return {f'pipeline_{name}': float(value) for name, value in times.items()}


def _cond(name, *arguments):
  """`jax.lax.cond`, to be found in the compiled program by its scope."""
  with jax.named_scope(f'pipeline_{name}'):
    return jax.lax.cond(*arguments)


def _plus(total, nats):
  return total._replace(nats=total.nats + nats)


def _add(total, part):
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _add_at(total, chunk, part):
  return jax.tree.map(
    lambda a, b: a.at[chunk].add(b.astype(a.dtype)), total, part
  )


def _by_row(tree):
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _wide(tree):
  """Shapes for sums."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), tree
  )
