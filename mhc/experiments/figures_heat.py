"""The figures that are heat maps: parts, spikes and streams.

Each is a function of plain data, as in `figures`. They are in cividis, whose
lightness grows with the value, and cells say their numbers.
"""

from collections.abc import Sequence
import math

from matplotlib import colormaps
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from mhc.experiments import figure_style as style
from mhc.experiments import statistics

STATES = ('off', 'static', 'dynamic')
MOST_READS = 3


@style.styled
def ablation(cells: Sequence[dict]) -> Figure | None:
  """Draws the gap of each choice of parts, a panel a kind.

  Cells say the mean and its 95 % interval, bold where that is on one side of
  0; darker is lower.
  """
  cells = [one for one in cells if math.isfinite(style.number(one['mean']))]
  if not cells:
    return None
  kinds = [*dict.fromkeys(one['kind'] for one in cells)]
  columns = [s for s in STATES if any(one['pre'] == s for one in cells)]
  lines = [(post, res) for post in STATES for res in STATES]
  lines = [
    both
    for both in lines
    if any((one['post'], one['res']) == both for one in cells)
  ]
  across = min(2, len(kinds))
  down = math.ceil(len(kinds) / across)
  width = 1.8 + across * 1.2 * len(columns)
  height = max(1.9, 0.4 + down * (0.35 + 0.36 * len(lines)))
  figure, axes = style.subplots(
    down, across, width, height, sharex=True, sharey=True
  )
  means = [style.number(one['mean']) for one in cells]
  for axis, kind in zip(axes.flat, kinds, strict=False):
    grid = np.full((len(lines), len(columns)), np.nan)
    places = {}
    for one in cells:
      if one['kind'] == kind:
        line = lines.index((one['post'], one['res']))
        place = line, columns.index(one['pre'])
        grid[place], places[place] = one['mean'], one
    image = _grid(axis, grid, min(means), max(means))
    for (line, column), one in places.items():
      low, high = style.number(one['low']), style.number(one['high'])
      text = f'{one["mean"]:+.4f}'
      if math.isfinite(low):
        text += f'\n[{low:+.4f}, {high:+.4f}]'
      _say(axis, image, line, column, text, 6.5, weight=_weight(low, high))
    axis.set_title(style.short(kind))
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(lines)), [', '.join(both) for both in lines])
  _finish(figure, axes, len(kinds))
  figure.supxlabel('H_pre', fontsize=8)
  figure.supylabel('H_post, H_res', fontsize=8)
  _bar(figure, image, axes.ravel().tolist(), 'gap (nats / token)')
  return figure


def _finish(figure, axes, used):
  """Hides the panels after the first `used`; ticks at the lowest of each."""
  for axis in axes.flat[used:]:
    axis.set_visible(False)
  for axis in axes.flat[max(0, used - axes.shape[1]) : used]:
    axis.tick_params(labelbottom=True)


def _bar(figure, image, axes, text):
  height = figure.get_figheight()
  bar = figure.colorbar(image, ax=axes, fraction=0.05, aspect=8 * height)
  bar.set_label(text)


def _weight(low, high):
  return 'bold' if low > 0 or high < 0 else 'normal'


def _grid(axis, values, low, high):
  """A heat map; what is missing is hatched."""
  if high <= low:
    low, high = low - max(1e-3, abs(low)), high + max(1e-3, abs(high))
  axis.set_facecolor('white')
  rows, columns = values.shape
  axis.fill_between(
    [-0.5, columns - 0.5],
    -0.5,
    rows - 0.5,
    facecolor='white',
    edgecolor='#BBBBBB',
    hatch='///',
    linewidth=0,
  )
  image = axis.imshow(
    values, cmap='cividis', vmin=low, vmax=high, aspect='auto', zorder=2
  )
  axis.tick_params(length=0)
  return image


def _say(axis, image, line, column, text, size=7.0, **font):
  """Text in a cell of a heat map, in what is readable on its colour."""
  value = image.norm(float(image.get_array()[line, column]))
  red, green, blue, _ = colormaps['cividis'](float(value))
  light = 0.3 * red + 0.59 * green + 0.11 * blue
  axis.text(
    column,
    line,
    text,
    ha='center',
    va='center',
    fontsize=size,
    color='black' if light > 0.45 else 'white',
    zorder=3,
    **font,
  )


@style.styled
def stability(
  rows: Sequence[dict], designs: Sequence[str] = ()
) -> Figure | None:
  """Draws how many runs had a loss spike, over learning rate and depth.

  A panel a design; a run that is not finite counts. Small below: the share's
  95 % interval by Clopper and Pearson.
  """
  if not rows:
    return None
  looks = style.looks((row['variant'] for row in rows), designs)
  lrs = sorted({row['lr'] for row in rows})
  depths = sorted({row['blocks'] for row in rows}, reverse=True)
  each = max(1.7, 0.74 * len(lrs)) + 0.15
  across = max(1, min(len(looks), int(8.2 // each)))
  down = math.ceil(len(looks) / across)
  height = max(1.9, 0.45 + down * (0.4 + 0.36 * len(depths)))
  size = 1.1 + each * across, height
  figure, axes = style.subplots(down, across, *size, sharex=True, sharey=True)
  for axis, (design, look) in zip(axes.flat, looks.items(), strict=False):
    grid = np.full((len(depths), len(lrs)), np.nan)
    texts = {}
    for row in rows:
      if row['variant'] == design:
        place = depths.index(row['blocks']), lrs.index(row['lr'])
        texts.setdefault(place, []).append(_spiked(row))
    for place, spiked in texts.items():
      grid[place] = sum(spiked) / len(spiked)
    image = _grid(axis, grid, 0.0, 1.0)
    for (line, column), spiked in texts.items():
      found = statistics.proportion(sum(spiked), len(spiked))
      text = f'{sum(spiked)} of {len(spiked)}'
      text += f'\n[{found.low:.2f}, {found.high:.2f}]'
      _say(axis, image, line, column, text)
    axis.set_title(look.label)
    axis.set_xticks(range(len(lrs)), [f'{lr:g}' for lr in lrs])
    axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
  figure.supxlabel('learning rate', fontsize=8)
  figure.supylabel('blocks', fontsize=8)
  _finish(figure, axes, len(looks))
  _bar(figure, image, axes.ravel().tolist(), 'share with a loss spike')
  return figure


def _spiked(row) -> bool:
  loss = style.number(row['heldout_nats'])
  return bool(row['loss_spikes']) or not math.isfinite(loss)


@style.styled
def reads(
  profiles: Sequence[dict], designs: Sequence[str] = ()
) -> Figure | None:
  """Draws which streams sub-layers read and write, a line a design.

  At most the first MOST_READS designs; H_pre and H_post have one scale each.
  """
  profiles = [one for one in profiles if one.get('pre_mean')][:MOST_READS]
  if not profiles:
    return None
  looks = style.looks((one['design'] for one in profiles), designs)
  height = 0.3 + 1.55 * len(profiles)
  shape = {'sharex': 'row', 'width_ratios': (1, 1, 0.9)}
  figure, axes = style.subplots(len(profiles), 3, 9.0, height, **shape)
  for column, key in enumerate(('pre_mean', 'post_mean')):
    name = ('H_pre', 'H_post')[column]
    maps = [style.numbers(one[key]).T for one in profiles]
    low = min(0.0, *(float(np.nanmin(each)) for each in maps))
    high = max(float(np.nanmax(each)) for each in maps)
    for axis, one, each in zip(axes[:, column], profiles, maps, strict=True):
      n, depth = each.shape
      image = axis.imshow(
        each,
        cmap='cividis',
        vmin=low,
        vmax=high if high > low else low + 1,
        aspect='auto',
        interpolation='nearest',
        extent=(0.5, depth + 0.5, n + 0.5, 0.5),
      )
      axis.set_yticks(range(1, n + 1))
      axis.set_title(f'{style.short(one["design"])}: {name}')
      axis.set_ylabel('stream')
      axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    _bar(figure, image, axes[:, column].tolist(), f'{name}, mean')
  most = max(len(one['pre_mean'][0]) for one in profiles)
  for axis, one in zip(axes[:, 2], profiles, strict=True):
    style.over_depth(axis, one.get('streams_read'), looks[one['design']])
    style.label(axis, 'streams read', '', 'streams')
    axis.set_ylim(0, most + 0.3)
    axis.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
  for axis in axes[-1]:
    axis.set_xlabel('sub-layer l')
  return figure
