"""When each stage of a pipeline does each microbatch: ticks of every schedule.

P devices hold V stages each, S = P V in all; F(s, m) and B(s, m) are the ticks
of stage s for microbatch m, both [S, M], -1 for nothing. What is handed over in
one tick is used in the next:

    F(s, m) > F(s - 1, m)     B(s, m) > B(s + 1, m)

A device does at most one F and then one B a tick. The last stage computes its
forward pass, the head and the loss inside of B, so that

    B(S - 1, m) > F(S - 2, m)     and F(S - 1, m) = -1,

unless its forward pass stands alone (`last_forward`), which a head computed by
all devices between F and B needs: then B(S - 1, m) >= F(S - 1, m).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

Ticks = tuple[np.ndarray, np.ndarray]


class Shape(NamedTuple):
  """P, V and M, and whether the last stage has an F."""

  devices: int
  chunks: int
  microbatches: int
  last_forward: bool = True

  @property
  def stages(self) -> int:
    return self.devices * self.chunks

  def grid(self) -> tuple[np.ndarray, np.ndarray]:
    """s [S, 1] and m [1, M]."""
    return np.arange(self.stages)[:, None], np.arange(self.microbatches)[None]


def gpipe(shape: Shape) -> Ticks:
  """All forward, then all backward: F = m + s, B = M + P - 2 + m + P - 1 - s.

  The first B shares a tick with the last stage's last F, where it has one.
  """
  s, m = shape.grid()
  first = shape.microbatches + shape.devices - 2
  return _packed(shape, m + s, first + m + shape.devices - 1 - s)


def one_f_one_b(shape: Shape) -> Ticks:
  """One forward, one backward: F = m + s, B = m + 2 (P - 1) - s."""
  s, m = shape.grid()
  return _packed(shape, m + s, m + 2 * (shape.devices - 1) - s)


def wave_v(shape: Shape) -> Ticks:
  """A V of S = 2 P stages: F = 2 m + s, B = 2 m + 4 P - 1 - s.

  The two stages of a device, s and 2 P - 1 - s, differ in parity: their F never
  meet, nor do their B.
  """
  s, m = shape.grid()
  return _packed(shape, 2 * m + s, 2 * m + 4 * shape.devices - 1 - s)


def interleaved(shape: Shape) -> Ticks:
  """Interleaved 1F1B, stage s on device s mod P, by a greedy rule.

  Of what is ready a device takes the deepest F and the shallowest B, with at
  most S microbatches between their first F and their last B.
  """

  def wishes(kind, device, done):
    own = range(device, shape.stages, shape.devices)
    if kind == 'B':
      return own
    full = done['F'][0] - done['B'][0] == shape.stages
    return [s for s in reversed(own) if s > 0 or not full]

  return _as_soon_as_possible(shape, wishes)


def dualpipev(shape: Shape) -> Ticks:
  """DeepSeek's DualPipeV: each device's order of operations, each when it can.

  Device d holds stages d and 2 P - 1 - d. The original splits B in a part for
  inputs and a part for weights; with recomputation the split would compute the
  forward pass twice. Here B is whole, and the eighth phase is empty.
  """
  queues = [_dualpipev_order(shape, d) for d in range(shape.devices)]

  def wishes(kind, device, done):
    own = device, shape.stages - 1 - device
    position = sum(done[k][s] for k in 'FB' for s in own)
    return [s for k, s in queues[device][position : position + 1] if k == kind]

  return _as_soon_as_possible(shape, wishes)


def _dualpipev_order(shape: Shape, device: int) -> list[tuple[str, int]]:
  """Seven phases, as (kind, stage)."""
  f0, b0 = [(kind, device) for kind in 'FB']
  f1, b1 = [(kind, shape.stages - 1 - device) for kind in 'FB']
  after = shape.devices - 1 - device
  phases = (
    (2 * after, [f0]),
    (device + 1, [f0, f1]),
    (after, [b1, f1]),
    (shape.microbatches - shape.devices - after, [f0, b1, f1, b0]),
    (after, [b1, f1, b0]),
    (device + 1, [b1, b0]),
    (after, [b0]),
  )
  order = [op for times, phase in phases for op in times * phase]
  last = ('F', shape.stages - 1)
  return [op for op in order if op != last or shape.last_forward]


def forward(placement: str, shape: Shape) -> np.ndarray:
  """F alone, of every stage, in as few ticks as there can be: [S, M].

  A V has F = 2 m + s: T = 2 (M + P - 1). Else microbatches come in rounds of P,
  each through chunk after chunk; M mod P join the last round, where all wait
  between chunks, and no device has a gap if M >= P: T = V M + P - 1.
  """
  s, m = shape.grid()
  if placement == 'vshape':
    return 2 * m + s
  chunk, device = np.divmod(s, shape.devices)
  whole = shape.microbatches // shape.devices
  number = np.minimum(m // shape.devices, max(whole - 1, 0))
  start = number * shape.devices
  length = np.where(
    number < whole - 1,
    shape.devices,
    np.maximum(shape.microbatches - start, shape.devices),
  )
  return start * shape.chunks + chunk * length + (m - start) + device


class ScheduleSpec(NamedTuple):
  """A schedule by its name: placement, stages a device, ticks."""

  placement: Literal['linear', 'loop', 'vshape']
  chunks: int | None  # None for any number from 2
  ticks: Callable[[Shape], Ticks]
  rounds: int = 0  # of P microbatches that it needs


SCHEDULES = {
  'gpipe': ScheduleSpec('linear', 1, gpipe),
  '1f1b': ScheduleSpec('linear', 1, one_f_one_b),
  'interleaved': ScheduleSpec('loop', None, interleaved),
  'wave_v': ScheduleSpec('vshape', 2, wave_v),
  'dualpipev': ScheduleSpec('vshape', 2, dualpipev, rounds=2),
}


def _packed(shape: Shape, f: np.ndarray, b: np.ndarray) -> Ticks:
  """Formulas' ticks, less those in which nobody works (P = 1 or M = 1)."""
  ticks = np.stack([f, b])
  present = np.ones_like(ticks, bool)
  present[0, -1] = shape.last_forward
  busy = np.unique(ticks[present])
  f, b = np.where(present, np.searchsorted(busy, ticks), -1)
  return f, b


def _as_soon_as_possible(shape: Shape, wishes: Callable) -> Ticks:
  """Plays ticks until all is done; a device does the first wish that is ready.

  Args:
    shape: of the pipeline, S > 1.
    wishes: from 'F' or 'B', a device and the number of microbatches that each
      stage has done: stages by preference, each for its next microbatch.
  """
  last = shape.stages - 1
  # Lists: they are looked at one by one, many times.
  f, b = np.full((2, shape.stages, shape.microbatches), -1).tolist()
  done = {kind: [0] * shape.stages for kind in 'FB'}

  def ready(kind, s, m):
    if kind == 'F':
      return s == 0 or 0 <= f[s - 1][m] < tick
    if s < last:
      return 0 <= b[s + 1][m] < tick
    if shape.last_forward:
      return 0 <= f[s][m] <= tick
    return 0 <= f[s - 1][m] < tick

  tick = 0
  while done['B'][0] < shape.microbatches:
    busy = False
    for device in range(shape.devices):
      for kind, ticks in (('F', f), ('B', b)):
        for s in wishes(kind, device, done):
          m = done[kind][s]
          if (kind, s) == ('F', last) and not shape.last_forward:
            continue
          if m < shape.microbatches and ready(kind, s, m):
            ticks[s][m] = tick
            done[kind][s] += 1
            busy = True
            break
    assert busy, f'nothing can be done in tick {tick}'
    tick += 1
  return np.array(f), np.array(b)
