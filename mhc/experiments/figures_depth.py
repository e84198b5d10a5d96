"""The figures of what changes with depth and along the other axes.

Each is a function of plain data, as in `figures`.
"""

from collections.abc import Sequence
import math
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np

from mhc.experiments import figure_style as style

# What a sub-layer leaves of a difference of streams, for scale.
DECAY = 0.98


@style.styled
def contraction(
  profiles: Sequence[dict], designs: Sequence[str] = ()
) -> Figure | None:
  """Draws what products of mappings leave of the streams' differences.

  Three panels against sub-layer: sigma_diff of the products, trained (solid)
  and at step 0 (dotted), not below SMALLEST; effective rank; entropy. Designs
  differ by markers.
  """
  panels = (
    ('sigma_diff', 'contraction of differences', 'sigma_diff of the product'),
    ('effective_rank', 'effective rank', 'streams'),
    ('entropy', 'entropy', 'share of the largest'),
  )
  panels = [one for one in panels if any(p.get(one[0]) for p in profiles)]
  if not panels:
    return None
  looks = style.looks((one['design'] for one in profiles), designs)
  size = max(3.5, 2.8 * len(panels)), 2.9
  figure, axes = style.subplots(1, len(panels), *size)
  started = False
  for axis, (key, title, unit) in zip(axes[0], panels, strict=True):
    for number, one in enumerate(profiles):
      look = looks[one['design']]
      values = _floor(one.get(key)) if key == 'sigma_diff' else one.get(key)
      style.over_depth(axis, values, look, number, linestyle='-')
      if key == 'sigma_diff' and one.get('sigma_diff_init'):
        started = True
        plain = {'linestyle': ':', 'linewidth': 1.0, 'fillstyle': 'none'}
        values = _floor(one['sigma_diff_init'])
        style.over_depth(axis, values, look, number, **plain)
    style.label(axis, title, 'sub-layer l', unit)
    axis.xaxis.set_major_locator(
      ticker.MaxNLocator(5, integer=True, min_n_ticks=1)
    )
    most = max(len(one.get(key) or ()) for one in profiles)
    axis.set_xlim(0.4, most + 0.6)
    if key == 'sigma_diff':
      depth = np.array([0.5, most + 0.5])
      axis.plot(depth, DECAY**depth, color='black', linewidth=0.7)
      style.log_axis(axis)
    elif key == 'effective_rank':
      axis.set_ylim(0.9, max(2.0, axis.get_ylim()[1]))
    else:
      axis.set_ylim(-0.03, 1.03)
  handles = [style.handle(look, linestyle='-') for look in looks.values()]
  if panels[0][0] == 'sigma_diff':
    if started:
      dots = {'linestyle': ':', 'linewidth': 1.0, 'color': 'black'}
      handles.append(Line2D([], [], label='at step 0', **dots))
    line = {'color': 'black', 'linewidth': 0.7}
    handles.append(Line2D([], [], label=f'${DECAY:g}^l$', **line))
  style.legend(figure, handles)
  return figure


def _floor(values):
  """A list of numbers, none below what a log axis shows."""
  return np.maximum(style.numbers(values or []), style.SMALLEST).tolist()


@style.styled
def depth(points: Sequence[dict], designs: Sequence[str] = ()) -> Figure | None:
  """Draws how much of a difference is left at the end, against depth.

  sigma_diff after all L sub-layers, and the sub-layers in which it halves; an
  arrow at the top is a stack in which it never does.
  """
  points = [one for one in points if len(one['blocks'])]
  if not points:
    return None
  looks = style.looks((one['design'] for one in points), designs)
  figure, (pair,) = style.subplots(1, 2, style.PAGE, 2.9)
  every = sorted({blocks for one in points for blocks in one['blocks']})
  never = False
  for one in points:
    look = looks[one['design']]
    line = {'color': look.color, 'linestyle': look.line, 'marker': look.marker}
    left = np.maximum(style.numbers(one['sigma_diff']), style.SMALLEST)
    half = style.numbers(one['half_life'])
    pair[0].plot(one['blocks'], left, **line)
    pair[1].plot(
      one['blocks'], np.where(np.isfinite(half), half, np.nan), **line
    )
    for blocks, value in zip(one['blocks'], half, strict=True):
      if not math.isfinite(value):
        never = True
        _at_the_top(pair[1], blocks, look)
  smooth = np.geomspace(every[0], every[-1], 60)
  thin = {'color': 'black', 'linewidth': 0.7}
  pair[0].plot(smooth, DECAY ** (2 * smooth), **thin)
  pair[1].plot(smooth, np.full(60, math.log(0.5) / math.log(DECAY)), **thin)
  for axis in pair:
    _axis_values(axis, every)
    style.log_axis(axis)
  if never:
    low, high = pair[1].get_ylim()
    pair[1].set_ylim(low, high * (high / low) ** 0.15)
  style.label(pair[0], '', 'blocks', 'sigma_diff after L sub-layers')
  style.label(pair[1], '', 'blocks', 'half-life (sub-layers)')
  handles = [style.handle(look) for look in looks.values()]
  text = f'${DECAY:g}^L$, L = 2 x blocks'
  handles.append(Line2D([], [], label=text, **thin))
  if never:
    arrow = {'marker': '^', 'linestyle': '', 'color': 'black'}
    arrow |= {'fillstyle': 'none'}
    handles.append(Line2D([], [], label='never halves', **arrow))
  style.legend(figure, handles)
  return figure


def _at_the_top(axis, x, look):
  where = {'transform': axis.get_xaxis_transform(), 'clip_on': False}
  arrow = {'marker': '^', 'markersize': 7, 'fillstyle': 'none', 'zorder': 5}
  axis.plot([x], [0.97], color=look.color, **arrow, **where)


@style.styled
def over_axis(
  rows: Sequence[dict],
  axis: str,
  kinds: Sequence[str],
  designs: Sequence[str] = (),
) -> Figure | None:
  """Draws gap, column residual, backward gain and time against an axis.

  Means with 95 % t intervals over the seeds, of the logarithms where the axis
  is one, and dots for the runs. A panel without data is left out. A design's
  row counts where it has the axis, in `setting` or as a column.
  """
  panels = (
    ('gap_nats', 'held-out loss', 'gap (nats / token)', False),
    ('column_residual', 'column residual', '|column sum - 1|', True),
    ('gain_bwd_max', 'backward gain', 'largest Amax gain', True),
    ('step_time_ratio', 'time of a step', 'ratio to residual', True),
  )
  found = {one: _by_value(rows, axis, kinds, one[0]) for one in panels}
  found = {one: values for one, values in found.items() if any(values.values())}
  if not found:
    return None
  across = min(2, len(found))
  down = math.ceil(len(found) / across)
  size = (7.2 if across == 2 else 4.2), 0.5 + 2.3 * down
  figure, grid = style.subplots(down, across, *size)
  looks = style.looks(
    (kind for values in found.values() for kind in values if values[kind]),
    designs,
  )
  every = {x for values in found.values() for k in values for x in values[k]}
  places = _places(every)
  for panel in grid.flat[len(found) :]:
    panel.set_visible(False)
  for panel, (one, values) in zip(grid.flat, found.items(), strict=False):
    _, title, unit, logarithmic = one
    for number, (kind, look) in enumerate(looks.items()):
      shift = number - (len(looks) - 1) / 2
      _means(panel, values[kind], places, shift, look, logarithmic)
    style.label(panel, title, _axis_word(axis), unit)
    numeric = all(place == value for value, place in places.items())
    if numeric:
      _axis_values(panel, sorted(every))
    else:
      panel.set_xticks([*places.values()], [str(value) for value in places])
    if logarithmic:
      style.log_axis(panel, least=1.5)
    if one[0] != 'column_residual':
      neutral = float(logarithmic)
      panel.axhline(neutral, color='black', linewidth=0.8, zorder=1)
  style.legend(figure, [style.handle(look) for look in looks.values()])
  return figure


def _by_value(rows, axis, kinds, key):
  """Kind -> value of the axis -> finite numbers of its runs."""
  found: dict[str, dict[Any, list[float]]] = {kind: {} for kind in kinds}
  for row in rows:
    value = row['setting'].get(axis, row.get(axis.split('.')[-1]))
    if axis == 'model.num_blocks':
      value = row['setting'].get(axis, row.get('blocks'))
    number = style.number(row.get(key))
    if row['variant'] in found and value is not None and math.isfinite(number):
      found[row['variant']].setdefault(value, []).append(number)
  return found


def _places(values):
  """Value -> place on the axis: itself, if all are positive numbers."""
  usual = all(
    isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    for value in values
  )
  if usual:
    return {value: value for value in sorted(values)}
  return {value: i for i, value in enumerate(sorted(values, key=str))}


def _means(panel, by_value, places, shift, look, logarithmic):
  xs, means, bars, dots = [], [], [], []
  numeric = all(place == value for value, place in places.items())
  for value in places:
    if value not in by_value:
      continue
    x = places[value]
    x = x * 1.025**shift if numeric else x + 0.03 * shift
    runs = np.array(by_value[value])
    if logarithmic:
      runs = np.maximum(runs, style.SMALLEST)
      mean, low, high = map(math.exp, style.interval(np.log(runs)))
    else:
      mean, low, high = style.interval(runs)
    xs.append(x)
    means.append(mean)
    bars.append(np.nan_to_num([mean - low, high - mean]))
    dots += [(x, float(run)) for run in runs]
  if not xs:
    return
  plain = {'marker': '.', 'markersize': 3.5, 'linestyle': '', 'alpha': 0.6}
  panel.plot(*zip(*dots, strict=True), color=look.color, **plain)
  panel.errorbar(
    xs,
    means,
    np.array(bars).T,
    color=look.color,
    linestyle=look.line,
    marker=look.marker,
    capsize=2.5,
    elinewidth=0.9,
  )


def _axis_values(panel, values):
  """A log2 axis, ticked where there is data."""
  panel.set_xscale('log', base=2)
  low, high = panel.get_xlim()
  if high < 1.5 * low:
    panel.set_xlim(values[0] / 2, values[-1] * 2)
  style.plain_ticks(panel, values)


def _axis_word(axis):
  words = {'num_streams': 'streams n', 'sinkhorn_iters': 't_max (iterations)'}
  name = axis.split('.')[-1]
  return words.get(name, name.removeprefix('num_').replace('_', ' '))
