"""A pipeline schedule as a picture: a row a device, time to the right.

Time is lock-step: a tick begins when every device has finished the last one. B
follows the F of its tick at once. What is white is the bubble.
"""

import pathlib

from matplotlib import colors
from matplotlib import patches
from matplotlib.figure import Figure
import numpy as np

from mhc.pipeline import bubble
from mhc.pipeline import table as table_lib

# Okabe-Ito, readable with colour blindness; one colour a chunk, F in a tint.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00')
EMBED, HEAD = 'black', '#F0E442'
TINT = 0.6
MARK = 0.16  # of a row's height
INCHES = 0.12  # a unit of time, where the picture is not too wide then
WIDEST = 24.0


def draw(
  schedule: table_lib.Schedule, forward: float = 1.0, backward: float = 3.0
) -> Figure:
  """Draws F (light) and B (dark) with the number of their microbatch.

  Args:
    schedule: as built.
    forward: how long an F takes.
    backward: how long a B takes.
  """
  table = schedule.table
  f, b = (table[f'{kind}_chunk'] >= 0 for kind in 'fb')
  durations = (forward * f + backward * b).max(axis=1)
  starts = np.concatenate([[0], np.cumsum(durations)])
  unit = min(INCHES, WIDEST / starts[-1])
  figure = Figure(
    figsize=(max(6.0, unit * starts[-1] + 1), 0.3 * schedule.num_devices + 1.1),
    layout='constrained',
  )
  axis = figure.subplots()
  # The head is a part of the last B, or follows the last F.
  head = 'b' if schedule.head == 'last' and b.any() else 'f'
  # A digit of 6 points is about 0.055 inches wide.
  digits = len(str(schedule.num_microbatches - 1))
  for kind, present, cost in (('f', f, forward), ('b', b, backward)):
    numbered = 0.055 * digits <= unit * cost
    for tick, device in np.argwhere(present).tolist():
      chunk, m, first, last = (
        int(table[f'{kind}_{column}'][tick, device])
        for column in ('chunk', 'mb', 'first', 'last')
      )
      start = starts[tick] + (forward * f[tick, device] if kind == 'b' else 0)
      _box(axis, start, device, cost, 1, _color(chunk, kind))
      if first:
        _box(axis, start, device + 1 - MARK, cost, MARK, EMBED)
      if last and kind == head:
        _box(axis, start, device, cost, MARK, HEAD)
      if numbered:
        axis.text(
          *(start + cost / 2, device + 0.5, m),
          ha='center',
          va='center_baseline',
          fontsize=6,
          color='black' if kind == 'f' else 'white',
        )
  axis.set_xlim(0, starts[-1])
  axis.set_ylim(schedule.num_devices, 0)
  axis.set_yticks(
    np.arange(schedule.num_devices) + 0.5, range(schedule.num_devices)
  )
  axis.tick_params(axis='y', length=0)
  axis.set_ylabel('device')
  axis.set_xlabel(f'time (F {forward:g}, B {backward:g})')
  axis.set_title(
    f'{schedule.name}: P = {schedule.num_devices}, '
    f'M = {schedule.num_microbatches}, bubble '
    f'{bubble.fraction(schedule, forward, backward):.1%}',
    fontsize=11,
  )
  figure.legend(
    handles=_legend(schedule.num_chunks, b.any()),
    loc='outside lower center',
    ncols=2 * schedule.num_chunks + 2,
    frameon=False,
    fontsize=8,
  )
  return figure


def save(schedule: table_lib.Schedule, path: pathlib.Path) -> None:
  """Writes the picture to a PNG file."""
  draw(schedule).savefig(path, dpi=110)


def _color(chunk, kind):
  color = np.array(colors.to_rgb(COLORS[chunk % len(COLORS)]))
  return color + TINT * (1 - color) if kind == 'f' else color


def _box(axis, left, top, width, height, color):
  axis.add_patch(
    patches.Rectangle(
      *((left, top), width, height),
      facecolor=color,
      edgecolor='white',
      linewidth=0.4,
    )
  )


def _legend(num_chunks, has_backward):
  parts = [
    (f'{kind.upper()}, chunk {chunk}', _color(chunk, kind))
    for chunk in range(num_chunks)
    for kind in ('fb' if has_backward else 'f')
  ]
  parts += [('embedding', EMBED), ('head', HEAD)]
  return [patches.Patch(label=label, color=color) for label, color in parts]
