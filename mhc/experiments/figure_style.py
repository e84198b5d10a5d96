"""The look of figures for print: designs, layout and files.

A design has one colour, marker and line style in every figure, so that it is
found without colour as well.
"""

from collections.abc import Iterable, Sequence
import math
import re
from typing import Any, NamedTuple
import zlib

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np
from scipy import stats

from mhc.experiments import statistics
from mhc.runtime import files
from mhc.runtime import paths

# Okabe-Ito, readable with colour blindness; one colour a kind everywhere.
COLORS = {
  'residual': '#555555',
  'hc': '#D55E00',
  'mhc': '#0072B2',
  'identity': '#009E73',
  'mhc_lite': '#CC79A7',
  'kromhc': '#E69F00',
  'orthogonal': '#882255',
  'mhc_single_pass': '#56B4E9',
  'wide_residual': '#6F4E37',
  'frac': '#7B3FA0',
  'cyclic': '#8B8000',
  'tbp': '#5F7F00',
  'go': '#1B1B6F',
  'attn_res_block': '#7CB518',
  'attn_res': '#2F9E9E',
  'mhar': '#3B6FB6',
  'dense_former': '#B5338A',
  'x0': '#8B1A00',
}
# Kinds whose gain is 1 by construction overlap: dashes show all.
STYLES = {
  'residual': {'linestyle': (0, (1, 2)), 'linewidth': 2.5, 'zorder': 4},
  'identity': {'linestyle': (0, (5, 4)), 'zorder': 3},
}
LABELS = {
  'residual': 'residual',
  'hc': 'HC',
  'mhc': 'mHC',
  'identity': 'identity (H_res = I)',
  'mhc_lite': 'mHC-lite',
  'kromhc': 'KromHC',
  'orthogonal': 'orthogonal',
  'mhc_single_pass': 'mHC single-pass',
  'wide_residual': 'wide residual',
  'frac': 'Frac-Connections',
  'cyclic': 'C-mHC',
  'tbp': 'TBP-mHC',
  'go': 'go-mHC',
  'attn_res_block': 'AttnRes, blocks',
  'attn_res': 'AttnRes',
  'mhar': 'MHAR',
  'dense_former': 'DenseFormer',
  'x0': 'x0',
}
# Fonts of 8 to 9 points at the figure's own size; text stays text in a PDF.
RC: dict[str, Any] = {
  'font.size': 8,
  'axes.titlesize': 9,
  'axes.labelsize': 8,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8,
  'legend.fontsize': 8,
  'legend.frameon': False,
  'axes.linewidth': 0.7,
  'lines.linewidth': 1.3,
  'lines.markersize': 5,
  'pdf.fonttype': 42,
}
# Wraps a function that draws.
styled = matplotlib.rc_context(RC)
PAGE = 7.2  # inches, two columns of a paper
# The lightest colour of text and of lines without a design.
FADED = '#707070'
# Where a value of 0 lies on a log axis: below float32's rounding.
SMALLEST = 1e-8
LEVEL = 0.14  # inches of a level of `top_strip`

MARKERS: dict[str, Any] = {
  'residual': 's',
  'hc': '^',
  'mhc': 'o',
  'identity': 'D',
  'mhc_lite': 'v',
  'kromhc': 'P',
  'orthogonal': 'X',
  'mhc_single_pass': '*',
  'wide_residual': (5, 1, 0),
  'frac': (5, 1, 36),
  'cyclic': (3, 1, 0),
  'tbp': (3, 1, 180),
  'go': (6, 1, 0),
  'attn_res_block': (5, 0, 0),
  'attn_res': (6, 0, 0),
  'mhar': (7, 0, 0),
  'dense_former': (8, 1, 0),
  'x0': (7, 1, 0),
}
LINES: dict[str, Any] = {
  'residual': (0, (1, 1.5)),
  'hc': (0, (5, 1.5)),
  'mhc': '-',
  'identity': (0, (6, 1.5, 1, 1.5)),
  'mhc_lite': (0, (3, 1, 1, 1, 1, 1)),
  'kromhc': (0, (10, 2)),
  'orthogonal': (0, (2, 1)),
  'mhc_single_pass': (0, (10, 1.5, 2, 1.5)),
  'wide_residual': (0, (5, 1, 1, 1, 5, 2)),
  'frac': (0, (9, 2, 2, 2)),
  'cyclic': (0, (4, 2)),
  'tbp': (0, (4, 1, 1, 1)),
  'go': (0, (7, 1, 1, 1, 1, 1)),
  'attn_res_block': (0, (3, 2)),
  'attn_res': (0, (6, 2)),
  'mhar': (0, (6, 1, 2, 1)),
  'dense_former': (0, (8, 1, 3, 1)),
  'x0': (0, (1, 2)),
}
# Designs of other names: Tol's muted colours that are not among the above.
OTHERS: tuple[tuple[str, str, Any], ...] = (
  ('#332288', '<', (0, (4, 1))),
  ('#999933', '>', (0, (7, 1.5, 1, 1.5, 1, 1.5))),
  ('#117733', 'p', (0, (2, 2))),
  ('#AA4499', 'h', (0, (6, 3))),
  ('#44AA99', 'd', (0, (8, 1.5, 3, 1.5))),
  ('#661100', 'H', (0, (1, 1))),
  ('#88A0DC', '8', (0, (5, 1, 1, 1, 5, 3))),
  ('#222222', (4, 1, 0), (0, (3, 3))),
)
WORDS = {
  'model.num_blocks': ('{} block', '{} blocks'),
  'optimizer.learning_rate': ('rate {:g}',),
  'model.connection.num_streams': ('n = {}',),
  'model.connection.sinkhorn_iters': ('t_max = {}',),
  'model.dim': ('dim {}',),
}


class Look(NamedTuple):
  color: str
  marker: Any
  line: Any
  label: str


def look(design: str, designs: Iterable[str] = ()) -> Look:
  """The look of a design; a name that is no kind has its own among `designs`.

  It depends on the set of designs, never on their order: give all designs of a
  report to have the same in each of its figures.
  """
  if design in COLORS:
    color, marker = COLORS[design], MARKERS.get(design, 'o')
    return Look(color, marker, LINES.get(design, '-'), LABELS[design])
  taken: dict[int, str] = {}
  for name in sorted({design, *designs} - {*COLORS}):
    slot = zlib.crc32(name.encode()) % len(OTHERS)
    while slot % len(OTHERS) in taken and len(taken) < len(OTHERS):
      slot = (slot + 1) % len(OTHERS)
    taken.setdefault(slot, name)
    if name == design:
      return Look(*OTHERS[slot], short(design))
  raise AssertionError(design)


def short(design: str) -> str:
  """The name of a design for the middle of a line."""
  if design in LABELS:
    return LABELS[design].split(' (')[0]
  kinds = [kind for kind in LABELS if design.startswith(f'{kind}_')]
  if not kinds:
    return design.replace('_', ' ')
  kind = max(kinds, key=len)
  return f'{short(kind)} {design[len(kind) + 1 :].replace("_", " ")}'


def looks(names: Iterable[str], designs: Sequence[str]) -> dict[str, Look]:
  """The looks of the designs of a figure, in the order of COLORS."""
  names = [*dict.fromkeys(names)]
  order = [*COLORS]
  names.sort(
    key=lambda name: (
      order.index(name) if name in order else len(order),
      name,
    )
  )
  return {name: look(name, (*names, *designs)) for name in names}


def setting_words(
  setting: dict[str, Any], axes: Iterable[str] | None = None
) -> str:
  """Tells the settings of `axes`, or all: '8 blocks, rate 0.003'."""
  told = setting if axes is None else axes
  return ', '.join(
    setting_word(axis, setting[axis]) for axis in told if axis in setting
  )


def setting_word(axis: str, value: Any) -> str:
  forms = WORDS.get(axis)
  try:
    if forms:
      return forms[0 if value == 1 else -1].format(value)
  except ValueError:  # a word where a number is usual
    pass
  text = f'{value:g}' if isinstance(value, float) else str(value)
  return f'{axis.split(".")[-1].replace("_", " ")} = {text}'


def number(value: Any) -> float:
  """A value of results.json: nan for None, which is not a finite number."""
  return math.nan if value is None else float(value)


def numbers(values: Any) -> np.ndarray:
  """A list of numbers, or of lists of them; None is nan."""
  return np.array(values, dtype=object).astype(np.float64)


def interval(values: Iterable[float]) -> tuple[float, float, float]:
  """(mean, low, high) by t; nan where not finite, bounds of one number too."""
  x = np.array([*values], np.float64)
  mean = float(x.mean()) if len(x) else math.nan
  if len(x) < 2 or not np.isfinite(x).all():
    return (mean if np.isfinite(mean) else math.nan), math.nan, math.nan
  half = float(stats.t.ppf(1 - statistics.ALPHA / 2, len(x) - 1))
  half *= float(x.std(ddof=1)) / math.sqrt(len(x))
  return mean, mean - half, mean + half


def subplots(rows: int, columns: int, width: float, height: float, **options):
  figure = Figure(figsize=(width, height), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for axis in axes.flat:
    axis.tick_params(labelsize=RC['xtick.labelsize'], width=0.7)
  return figure, axes


def label(axis, title: str, x: str, y: str) -> None:
  axis.set_title(title)
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.margins(x=0.07)
  axis.grid(alpha=0.3, linewidth=0.5)
  axis.set_axisbelow(True)


def legend(figure: Figure, handles: Sequence[Any]) -> None:
  """The figure's one legend, below its panels, which keep their height."""
  if not handles:
    return
  longest = max(len(one.get_label()) for one in handles)
  columns = int(figure.get_figwidth() / (0.62 + 0.06 * longest))
  columns = max(1, min(columns, len(handles)))
  rows = math.ceil(len(handles) / columns)
  figure.set_figheight(figure.get_figheight() + 0.165 * (rows - 1))
  figure.legend(
    handles=[*handles],
    loc='outside lower center',
    ncols=columns,
    handlelength=3,
    columnspacing=1.4,
    frameon=False,
  )


def handle(look: Look, **style) -> Line2D:
  """A design's line in a legend."""
  style = {'linestyle': look.line, 'marker': look.marker} | style
  return Line2D([], [], color=look.color, label=look.label, **style)


def plain_ticks(axis, values: Sequence[float | int], which: str = 'x') -> None:
  """Ticks on these values alone, as few as stand apart on a log axis."""
  values = sorted(set(values))
  part = axis.xaxis if which == 'x' else axis.yaxis
  span = math.log(values[-1] / values[0]) if values[0] > 0 else 0
  kept = values[:1]
  for value in values[1:]:
    if span == 0 or math.log(value / kept[-1]) > span / 9:
      kept.append(value)
  part.set_ticks(kept, [f'{value:g}' for value in kept])
  part.set_ticks([], minor=True)


def log_axis(axis, which: str = 'y', least: float = 4.0) -> None:
  """A log axis with plain numbers that spans a factor of `least` or more."""
  getattr(axis, f'set_{which}scale')('log')
  low, high = getattr(axis, f'get_{which}lim')()
  if high < least * low:
    middle = math.sqrt(low * high)
    low, high = middle / math.sqrt(least), middle * math.sqrt(least)
  getattr(axis, f'set_{which}lim')(low, high)
  part = axis.xaxis if which == 'x' else axis.yaxis
  decades = math.log10(high / low)
  if decades < 4:
    part.set_major_formatter(lambda value, _: f'{value:.4g}')
  if decades < 0.9:
    part.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
    part.set_minor_locator(ticker.NullLocator())
    return
  digits = '25' if decades < 1.5 else ''
  part.set_minor_formatter(
    lambda value, _: f'{value:g}' if f'{value:e}'[0] in digits else ''
  )
  axis.tick_params(axis=which, which='minor', labelsize=RC['xtick.labelsize'])


def over_depth(axis, values, look: Look, number: int = 0, **line) -> None:
  """A line over sub-layers; its few markers stand elsewhere for each number."""
  if not values:
    return
  values = numbers(values)
  every = max(1, math.ceil(len(values) / 6))
  axis.plot(
    np.arange(1, len(values) + 1),
    values,
    color=look.color,
    marker=look.marker,
    markersize=4,
    markevery=(number % every, every),
    **line,
  )


def top_strip(axis, marks: dict[Any, list[tuple[float, int]]]) -> None:
  """Draws what has no value above the data, a level a look.

  Args:
    axis: has its data and its y scale, linear.
    marks: look -> (x, how often); crosses on the look's marker.
  """
  marks = {one: where for one, where in marks.items() if where}
  if not marks:
    return
  low, high = axis.get_ylim()
  inches = axis.figure.get_figheight() - 1.0 - LEVEL * (len(marks) + 0.5)
  step = LEVEL / max(1.0, inches) * (high - low)
  axis.axhline(high, color=FADED, linewidth=0.7)
  for level, (one, where) in enumerate(marks.items()):
    y = high + (level + 0.75) * step
    for x, count in where:
      axis.plot([x], [y], marker=one.marker, color=one.color, fillstyle='none')
      axis.plot([x], [y], marker='x', color='black', linestyle='', markersize=7)
      if count > 1:
        axis.annotate(
          rf'$\times${count}',
          (x, y),
          xytext=(5, 0),
          textcoords='offset points',
          va='center',
          fontsize=7,
        )
  axis.set_ylim(low, high + (len(marks) + 0.5) * step)
  ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
  axis.set_yticks(ticks)


def save(figure: Figure, folder: paths.Path, name: str) -> str:
  """Writes NAME.png and NAME.pdf, equal bytes for equal figures.

  Returns:
    The name of the PNG, relative to `folder`.

  Raises:
    ValueError: the name has other than letters, digits, '.', '_' and '-'.
  """
  if not re.fullmatch(r'[\w.-]+', name):
    raise ValueError(f'figure name {name!r}: use letters, digits, . _ and -')
  with matplotlib.rc_context(RC):
    write(figure, folder / f'{name}.png', dpi=150, metadata={'Software': None})
    write(figure, folder / f'{name}.pdf', metadata={'CreationDate': None})
  return f'{name}.png'


def write(figure: Figure, path: paths.Path, **options):
  """Writes a figure in the format of the path's suffix."""
  if not paths.in_bucket(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as file:
    figure.savefig(file, format=path.suffix[1:], **options)
