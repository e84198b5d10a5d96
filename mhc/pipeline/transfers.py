"""Transfers between the stages of a pipeline, and the buffer slots they fill.

Every device holds V of the S = P V stages. F(s, m) and B(s, m) are the ticks of
stage s for microbatch m, -1 for nothing. Kept, each in a slot of a buffer:

    act   input of stage s > 0    end of tick F(s - 1, m)        to B(s, m)
    grad  of the output, s < S-1  start of tick B(s + 1, m) + 1  to B(s, m)
    head  the same of s = S - 1   tick F(s, m), between F and B  to B(s, m)
    kept  all that B needs        tick F(s, m), after F          to B(s, m)

The last is for `keeping`, where B computes nothing again.

In a schedule without B an input is kept to F(s, m). A head's gradient is kept
where the head is not a part of B(S - 1, m).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from mhc import config

Placement = Literal['linear', 'loop', 'vshape']
Index = tuple[int, ...]

SIDES = {1: 'right', -1: 'left', 0: 'self'}


def stage_of(
  placement: Placement, num_devices: int, device: int, chunk: int
) -> int:
  """linear, loop: v P + d. vshape: d on the way out, 2 P - 1 - d back."""
  if placement == 'vshape' and chunk == 1:
    return 2 * num_devices - 1 - device
  return chunk * num_devices + device


def places(
  placement: Placement, num_devices: int, num_chunks: int
) -> list[tuple[int, int]]:
  """(device, chunk) of each stage."""
  return sorted(
    ((d, v) for d in range(num_devices) for v in range(num_chunks)),
    key=lambda place: stage_of(placement, num_devices, *place),
  )


def shift(placement: Placement, num_devices: int, stage: int) -> int:
  """From a stage's device to that of the next: 1, -1, or 0 if it is the same.

  A loop is a ring: from device P - 1 on to device 0 is 1 too.
  """
  if placement == 'vshape':
    turn = num_devices - 1
    return (stage < turn) - (stage > turn)
  return int(num_devices > 1)


class Transfer(NamedTuple):
  """A slot's use, from the end of tick `start` to the end of tick `end`.

  Attributes:
    what: 'act', 'grad', 'head' or 'kept'.
    stage: whose input, or gradient of the output, it is.
    microbatch: m.
    device: the stage's.
    shift: of the channel that it comes through, 0 for none.
    start: the slot may still hold its previous tenant during this tick.
    end: the slot is read for the last time in this tick, and free after it.
    stored: (column, index) of the table's entry to store it by.
    read: (column, index) of those to read it by.
  """

  what: str
  stage: int
  microbatch: int
  device: int
  shift: int
  start: int
  end: int
  stored: tuple[str, Index]
  read: list[tuple[str, Index]]

  def __str__(self):
    return (
      f'tick {self.stored[1][0]}: {self.what} for stage {self.stage}, '
      f'microbatch {self.microbatch}'
    )


def all_transfers(
  placement: Placement,
  num_devices: int,
  head: config.Head,
  f: np.ndarray,
  b: np.ndarray,
) -> Iterator[Transfer]:
  """Yields the transfers of operations in ticks f and b, [S, M]."""
  last = len(f) - 1
  where = places(placement, num_devices, len(f) // num_devices)
  shape = f.shape
  f, b = f.tolist(), b.tolist()
  for s, m in np.ndindex(*shape):
    device, _ = where[s]
    tick_f, tick_b = f[s][m], b[s][m]
    if s > 0:
      side, start = shift(placement, num_devices, s - 1), f[s - 1][m]
      yield Transfer(
        *('act', s, m, device, side, start, max(tick_f, tick_b)),
        stored=(f'recv_act_{SIDES[side]}', (start, device)),
        read=[
          (column, (tick, device))
          for column, tick in (('f_slot', tick_f), ('b_slot', tick_b))
          if tick >= 0
        ],
      )
    if s < last and tick_b >= 0:
      side, start = -shift(placement, num_devices, s), b[s + 1][m]
      yield Transfer(
        *('grad', s, m, device, side, start, tick_b),
        stored=(f'recv_grad_{SIDES[side]}', (start + 1, device)),
        read=[('b_grad_slot', (tick_b, device))],
      )
    if min(tick_f, tick_b) >= 0:
      # It is stored before the tick's B has read what it reads.
      yield Transfer(
        *('kept', s, m, device, 0, tick_f - 1, tick_b),
        stored=('f_keep', (tick_f, device)),
        read=[('b_keep', (tick_b, device))],
      )
    if s == last and head == 'vocab':
      # It is stored before the tick's B has read what it reads.
      yield Transfer(
        *('head', s, m, device, 0, tick_f - 1, tick_b),
        stored=('head_slot', (tick_f,)),
        read=[('b_head_slot', (tick_b, device))],
      )
