"""Pipeline schedules: what each device does in each tick, as a table.

P devices hold V stages each; M microbatches pass all stages forward (F) and
then backward (B). B takes the input that F took and computes the stage again:
what is held between them is one stage input. A tick, on every device:

    1. gradients that were sent in the last tick arrive       recv_grad_*
    2. at most one F                                          f_*
    3. its output travels
    4. the head of one microbatch, on all devices together    head_*
    5. at most one B                                          b_*
    6. the activation that travelled is stored                recv_act_*

Columns are int32 [T, P] (head_*: [T]), -1 for nothing, flags 0:

    f_chunk f_mb f_slot       F's chunk, microbatch, slot of its input; stage 0
                              has no slot, it embeds
    f_first f_last            1 for the first stage, the last stage
    b_chunk b_mb b_slot b_first b_last      the same of B
    b_grad_slot               slot of the gradient that came; the last has none
    b_head_slot               the last stage's, of the head's gradient
    f_keep b_keep             slot of what F keeps for B, see `keeping`
    recv_act_right, _left, _self    slot for what comes with the channel of
                              shift +1, of shift -1, from the device itself
    recv_grad_right, _left, _self   the same of gradients
    head_mb head_slot         the head's microbatch, slot of its gradient on
                              the last stage's device

With head = 'last' the last stage has no F: its forward pass, the head and the
loss are part of its B. With head = 'vocab' the vocabulary lies across all
devices: the last stage has an F, and the head follows in the same tick.
"""

import collections
from collections.abc import Mapping
import dataclasses
import functools
import itertools
import types
from typing import Literal, get_args

import numpy as np

from mhc import config
from mhc.pipeline import schedules
from mhc.pipeline import transfers

Name = config.Schedule
Placement = transfers.Placement
Head = config.Head
Channel = tuple[Literal['act', 'grad'], int]

stage_of = transfers.stage_of

FLAGS = ('f_first', 'f_last', 'b_first', 'b_last')
COMMON = ('head_mb', 'head_slot')
COLUMNS = (
  *('f_chunk', 'f_mb', 'f_slot', 'b_chunk', 'b_mb', 'b_slot'),
  *('b_grad_slot', 'b_head_slot', 'f_keep', 'b_keep', *FLAGS, *COMMON),
  *(
    f'{r}_{side}'
    for r in ('recv_act', 'recv_grad')
    for side in transfers.SIDES.values()
  ),
)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A table and its sizes; equal names and sizes have equal tables.

  Attributes:
    name: of `Name`, or 'forward'.
    placement: which stages a device has, see `stage_of`.
    num_devices: P.
    num_chunks: V, stages a device.
    num_microbatches: M.
    head: see the top of the file.
    num_ticks: T.
    num_slots: stage inputs held, the largest number over devices.
    num_grad_slots: the same of gradients of stage outputs.
    num_head_slots: the same of gradients from the head ('vocab').
    num_kept_slots: stages between F and B, the largest number over devices.
    channels: ('act' or 'grad', shift): device d sends to (d + shift) mod P.
    table: column -> array, read-only.
  """

  name: str
  placement: Placement
  num_devices: int
  num_chunks: int
  num_microbatches: int
  head: Head
  num_ticks: int
  num_slots: int
  num_grad_slots: int
  num_head_slots: int
  num_kept_slots: int
  channels: tuple[Channel, ...]
  table: Mapping[str, np.ndarray] = dataclasses.field(compare=False, repr=False)


def minimum_microbatches(name: str, num_devices: int) -> int:
  """The fewest microbatches that the schedule is defined for."""
  return max(1, _spec(name).rounds * num_devices)


@functools.cache
def build(
  name: str,
  num_devices: int,
  num_microbatches: int,
  *,
  num_chunks: int = 2,
  head: str = 'last',
) -> Schedule:
  """A training schedule.

  Args:
    name: one of `Name`.
    num_devices: P.
    num_microbatches: M.
    num_chunks: V of 'interleaved', from 2. The others do not look at it: they
      have one stage a device, or the two of a V.
    head: 'last' or 'vocab'.

  Raises:
    ValueError: for a name, a head or sizes that there is no schedule for.
  """
  spec = _spec(name)
  if head not in get_args(Head):
    raise ValueError(f"head must be 'last' or 'vocab', got {head!r}")
  _check_sizes(num_devices, num_microbatches)
  fewest = minimum_microbatches(name, num_devices)
  if num_microbatches < fewest:
    raise ValueError(
      f'schedule {name} needs at least {spec.rounds}P = {fewest} microbatches '
      f'on {num_devices} devices, got {num_microbatches}'
    )
  if spec.chunks is None and num_chunks < 2:
    raise ValueError(
      f'schedule {name} needs at least 2 stages a device, got {num_chunks}'
    )
  shape = schedules.Shape(
    num_devices, spec.chunks or num_chunks, num_microbatches, head == 'vocab'
  )
  return _tabulate(name, spec.placement, head, shape, *spec.ticks(shape))


@functools.cache
def build_forward(
  placement: Placement,
  num_devices: int,
  num_chunks: int,
  num_microbatches: int,
) -> Schedule:
  """F of every stage and no B, for evaluation; ValueError as in `build`."""
  _check_sizes(num_devices, num_microbatches)
  chunks = {'linear': 1, 'vshape': 2}.get(placement, max(num_chunks, 1))
  if num_chunks != chunks:
    raise ValueError(
      f'placement {placement} has {chunks} stages a device, got {num_chunks}'
    )
  shape = schedules.Shape(num_devices, num_chunks, num_microbatches)
  f = schedules.forward(placement, shape)
  return _tabulate('forward', placement, 'last', shape, f, np.full_like(f, -1))


def for_mesh(mesh: config.MeshConfig, num_microbatches: int) -> Schedule:
  """The schedule of a mesh's pipeline for a device's microbatches."""
  return build(
    mesh.schedule,
    mesh.pipe,
    num_microbatches,
    num_chunks=mesh.chunks,
    head=mesh.head,
  )


def peak_states(schedule: Schedule) -> int:
  """Activations and gradients that a device has slots for, in stage inputs.

  The head's gradients, one stream each instead of n, are not counted.
  """
  return schedule.num_slots + schedule.num_grad_slots


def validate(schedule: Schedule) -> None:
  """Checks what an executor relies on.

  Raises:
    AssertionError: with tick, stage and microbatch, or tick, device and column,
      unless every stage does F and B of every microbatch once and after what
      they need, what is handed over is stored where it is read and not
      overwritten before, and nothing else stands in the table.
  """
  table = schedule.table
  f, b = ticks_of(schedule)
  _check_ticks(schedule, f, b)
  shape = schedule.placement, schedule.num_devices, schedule.head
  room = {
    'act': schedule.num_slots,
    'grad': schedule.num_grad_slots,
    'head': schedule.num_head_slots,
    'kept': schedule.num_kept_slots,
  }
  slots, channels, tenants = [], set(), collections.defaultdict(list)
  for handed in transfers.all_transfers(*shape, f, b):
    column, at = handed.stored
    slot = int(table[column][at])
    assert 0 <= slot < room[handed.what], (
      f'{handed}: {column} is {slot}, of {room[handed.what]} slots'
    )
    for column, at in handed.read:
      assert table[column][at] == slot, (
        f'{handed}: is stored in slot {slot}, but {column} of tick {at[0]} is '
        f'{table[column][at]}'
      )
    slots.append((handed, slot))
    tenants[handed.what, handed.device, slot].append(handed)
    if handed.shift:
      channels.add((handed.what, handed.shift))
  for (_, _, slot), tenant in tenants.items():
    tenant.sort(key=lambda handed: handed.start)
    for old, new in itertools.pairwise(tenant):
      assert old.end <= new.start, (
        f'{new}: overwrites slot {slot}, which is read until tick {old.end}'
      )
  expected = _fill(*shape, f, b, slots)
  assert {*table} == {*expected}, f'columns are {sorted(table)}'
  for column, array in expected.items():
    found = table[column]
    assert found.shape == array.shape, f'{column} is {found.shape}'
    for tick, *device in np.argwhere(found != array).tolist():
      where = ''.join(f', device {d}' for d in device)
      raise AssertionError(
        f'tick {tick}{where}: {column} is {found[tick, *device]}, '
        f'must be {array[tick, *device]}'
      )
  assert schedule.num_ticks == len(expected['head_mb']), 'ticks are miscounted'
  assert channels == {*schedule.channels}, f'channels in use: {channels}'


def _spec(name: str) -> schedules.ScheduleSpec:
  if name not in schedules.SCHEDULES:
    known = ', '.join(schedules.SCHEDULES)
    raise ValueError(f'schedule must be one of {known}, got {name!r}')
  return schedules.SCHEDULES[name]


def _check_sizes(num_devices: int, num_microbatches: int):
  for what, size in (
    ('devices', num_devices),
    ('microbatches', num_microbatches),
  ):
    if size < 1:
      raise ValueError(f'a pipeline needs 1 or more {what}, got {size}')


def _tabulate(name, placement, head, shape, f, b) -> Schedule:
  """Gives every transfer the first slot that is free, in order of time.

  So there are as many slots as there are ever transfers at a time.
  """
  handed = [*transfers.all_transfers(placement, shape.devices, head, f, b)]
  slots = [0] * len(handed)
  free_from = {
    what: [[] for _ in range(shape.devices)]
    for what in ('act', 'grad', 'head', 'kept')
  }
  for i in sorted(range(len(handed)), key=lambda i: handed[i].start):
    ends = free_from[handed[i].what][handed[i].device]
    free = (slot for slot, end in enumerate(ends) if end <= handed[i].start)
    slots[i] = next(free, len(ends))
    ends[slots[i] : slots[i] + 1] = [handed[i].end]
  act, grad, loss, kept = (max(map(len, ends)) for ends in free_from.values())
  table = _fill(
    placement, shape.devices, head, f, b, zip(handed, slots, strict=True)
  )
  for array in table.values():
    array.setflags(write=False)
  channels = {(one.what, one.shift) for one in handed if one.shift}
  return Schedule(
    name=name,
    placement=placement,
    num_devices=shape.devices,
    num_chunks=shape.chunks,
    num_microbatches=shape.microbatches,
    head=head,
    num_ticks=len(table['head_mb']),
    num_slots=act,
    num_grad_slots=grad,
    num_head_slots=loss,
    num_kept_slots=kept,
    channels=tuple(sorted(channels, key=lambda c: (c[0], -c[1]))),
    table=types.MappingProxyType(table),
  )


def _fill(placement, num_devices, head, f, b, slots) -> dict[str, np.ndarray]:
  """The table of operations in ticks f and b, [S, M], and (transfer, slot)s."""
  num_ticks = 1 + int(max(f.max(), b.max()))
  table = {}
  for column in COLUMNS:
    size = (num_ticks,) if column in COMMON else (num_ticks, num_devices)
    table[column] = np.full(size, 0 if column in FLAGS else -1, np.int32)
  last = len(f) - 1
  where = transfers.places(placement, num_devices, len(f) // num_devices)
  for kind, ticks in (('f', f), ('b', b)):
    for s, m in np.argwhere(ticks >= 0).tolist():
      device, chunk = where[s]
      at = ticks[s, m], device
      table[f'{kind}_chunk'][at] = chunk
      table[f'{kind}_mb'][at] = m
      table[f'{kind}_first'][at] = s == 0
      table[f'{kind}_last'][at] = s == last
  if head == 'vocab':
    table['head_mb'][f[last]] = np.arange(f.shape[1])
  for handed, slot in slots:
    for column, at in (handed.stored, *handed.read):
      table[column][at] = slot
  return table


def ticks_of(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
  """F and B, [S, M], read off the table; each at most once."""
  table, num_chunks = schedule.table, schedule.num_chunks
  num_microbatches = schedule.num_microbatches
  shape = schedule.num_devices * num_chunks, num_microbatches
  f, b = np.full((2, *shape), -1)
  for kind, ticks in (('f', f), ('b', b)):
    chunks = table[f'{kind}_chunk']
    for tick, device in np.argwhere(chunks != -1).tolist():
      chunk = int(chunks[tick, device])
      m = int(table[f'{kind}_mb'][tick, device])
      does = f'tick {tick}, device {device}: {kind.upper()} of '
      assert 0 <= chunk < num_chunks, f'{does}chunk {chunk} of {num_chunks}'
      assert 0 <= m < num_microbatches, (
        f'{does}microbatch {m} of {num_microbatches}'
      )
      s = stage_of(schedule.placement, schedule.num_devices, device, chunk)
      assert ticks[s, m] < 0, (
        f'{does}stage {s}, microbatch {m} was done in tick {ticks[s, m]}'
      )
      ticks[s, m] = tick
  return f, b


def _check_ticks(schedule: Schedule, f: np.ndarray, b: np.ndarray):
  """Every operation is there, after what it needs."""
  last = len(f) - 1
  trains = schedule.name != 'forward'
  last_forward = not trains or schedule.head == 'vocab'
  for s, m in np.ndindex(*f.shape):
    activation = f[s - 1, m] if s else -1
    if s < last:
      gradient = b[s + 1, m]
    else:
      gradient = f[s, m] - 1 if last_forward else activation
    for kind, tick, wanted, after in (
      ('F', f[s, m], s < last or last_forward, activation),
      ('B', b[s, m], trains, gradient),
    ):
      does = f'{kind} of stage {s}, microbatch {m},'
      assert wanted or tick < 0, f'tick {tick}: {does} has no place there'
      assert tick >= 0 or not wanted, f'{does} is in no tick'
      assert tick > after or not wanted, (
        f'tick {tick}: {does} needs what is done in tick {after}'
      )
