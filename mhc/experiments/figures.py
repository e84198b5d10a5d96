"""The figures of what designs reach: losses and their differences.

Each is a function of plain data, as it stands in results.json, and returns None
where nothing is to be drawn. `designs` are all designs of the report, so that
one looks the same in each figure.
"""

from collections.abc import Sequence
import math
import re
import textwrap
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
import numpy as np

from mhc.experiments import figure_style as style

BAND = '#DDDDDD'
# Differences this much larger than usual bend the axis of `forest`.
FAR = 30.0


@style.styled
def forest(
  contrasts: Sequence[dict], designs: Sequence[str] = ()
) -> Figure | None:
  """Draws a line a contrast: its seeds, mean, 95 % interval and verdict.

  Declared ones come first, exploratory ones are lighter; they say the estimate
  in place of a verdict. A cross is a seed without a finite difference.
  """
  if not contrasts:
    return None
  lines = sorted(contrasts, key=lambda one: not one['declared'])
  names = [name for one in lines for name in (one['kind'], one['other'])]
  looks = style.looks(names, designs)
  labels = [_wrap(text) for text in _names(lines)]
  verdicts = [_wrap(_said(one)) for one in lines]
  texts = [*labels, *verdicts]
  row = 0.06 + 0.145 * (1 + max(text.count('\n') for text in texts))
  figure, axes = style.subplots(1, 1, 8.0, 0.9 + row * len(lines))
  axis = axes[0, 0]
  bent = _bent(lines)
  if bent:
    axis.set_xscale('symlog', linthresh=bent)
    # Ticks of the part around 0 would lie on each other.
    axis.xaxis.set_major_formatter(
      lambda value, _: '' if 0 < abs(value) < bent else f'{value:g}'
    )
  else:
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
  for y, (one, verdict) in enumerate(zip(lines, verdicts, strict=True)):
    if one.get('margin'):
      half = one['margin']
      axis.fill_betweenx([y - 0.5, y + 0.5], -half, half, color=BAND, lw=0)
    _draw_contrast(axis, y, one, looks[one['kind']])
    axis.text(
      1.02,
      y,
      verdict,
      transform=axis.get_yaxis_transform(),
      va='center',
      color='black' if one['declared'] else style.FADED,
    )
  declared = sum(bool(one['declared']) for one in lines)
  if 0 < declared < len(lines):
    axis.axhline(declared - 0.5, color=style.FADED, lw=0.7, linestyle='--')
  axis.axvline(0, color='black', linewidth=0.8, zorder=1)
  axis.set_ylim(len(lines) - 0.5, -0.5)
  axis.set_yticks(range(len(lines)), labels)
  for text, one in zip(axis.get_yticklabels(), lines, strict=True):
    text.set_color('black' if one['declared'] else style.FADED)
  axis.tick_params(axis='y', length=0)
  end = f'; logarithmic beyond {bent:.2g}' if bent else ''
  axis.set_xlabel(f'difference in held-out loss (nats / token{end})')
  style.legend(figure, _forest_legend(lines))
  return figure


def _draw_contrast(axis, y, one, look):
  alpha = 1.0 if one['declared'] else 0.5
  values = style.numbers(one['differences'])
  finite = values[np.isfinite(values)]
  axis.plot(
    finite,
    np.full(len(finite), y + 0.22),
    marker='.',
    markersize=4,
    linestyle='',
    color=look.color,
    alpha=0.8 * alpha,
    zorder=3,
  )
  if len(finite) < len(values):
    where = axis.get_yaxis_transform()
    plain = {'marker': 'x', 'color': 'black', 'linestyle': ''}
    axis.plot([0.98], [y], transform=where, alpha=alpha, zorder=5, **plain)
  mean, low, high = (style.number(one[key]) for key in ('mean', 'low', 'high'))
  if math.isfinite(low) and math.isfinite(high):
    bar = {'linewidth': 1.6, 'alpha': alpha, 'solid_capstyle': 'butt'}
    axis.plot([low, high], [y, y], color=look.color, marker='|', **bar)
  if math.isfinite(mean):
    axis.plot(
      [mean],
      [y],
      marker=look.marker,
      markersize=8 if look.marker == '*' else 6,
      color=look.color,
      alpha=alpha,
      zorder=4,
    )


def _names(lines):
  """The lines' names, with the settings that differ between them."""
  axes = [*dict.fromkeys(axis for one in lines for axis in one['setting'])]
  told = [
    axis
    for axis in axes
    if len({repr(one['setting'].get(axis)) for one in lines}) > 1
  ]
  for one in lines:
    pair = f'{style.short(one["kind"])} - {style.short(one["other"])}'
    words = style.setting_words(one['setting'], told)
    yield f'{one["panel"]}: {pair}' + (f', {words}' if words else '')


def _wrap(text):
  """Breaks a line between settings and before an interval, not within."""
  bound = re.sub(r'(?<=\d) (?=block)|(?<=,) (?=[-+\d.]+\])', '\xa0', text)
  bound = re.sub(r'\b(lr|dim|=) (?=\S)| (?==)', _bind, bound)
  return textwrap.fill(bound, 35).replace('\xa0', ' ')


def _bind(found):
  return found[0].replace(' ', '\xa0')


def _said(one):
  if one['verdict']:
    return one['verdict']
  mean, low, high = (style.number(one[key]) for key in ('mean', 'low', 'high'))
  if not math.isfinite(mean):
    return 'not estimated'
  text = f'{mean:+.4f}'
  return text + (f' [{low:+.4f}, {high:+.4f}]' if math.isfinite(low) else '')


def _bent(lines) -> float:
  """Where the axis bends from linear to logarithmic; 0 for nowhere."""
  values = np.concatenate([style.numbers(one['differences']) for one in lines])
  values = np.abs(values[np.isfinite(values)])
  usual = float(np.median(values)) if len(values) else 0.0
  return 3 * usual if usual and values.max() > FAR * usual else 0.0


def _forest_legend(lines):
  plain = {'color': 'black', 'linestyle': ''}
  handles = [
    Line2D([], [], marker='.', markersize=4, label='a seed', **plain),
    Line2D([], [], marker='o', label='mean, 95 % interval', color='black'),
  ]
  margins = {one['margin'] for one in lines if one.get('margin')}
  if margins:
    text = f' {margins.pop():g}' if len(margins) == 1 else ''
    handles.append(Patch(color=BAND, label=f'margin{text}'))
  differences = [style.numbers(one['differences']) for one in lines]
  if not np.isfinite(np.concatenate(differences)).all():
    handles.append(Line2D([], [], marker='x', label='not finite', **plain))
  if not all(one['declared'] for one in lines):
    handles.append(
      Line2D([], [], color='black', alpha=0.4, label='exploratory')
    )
  return handles


@style.styled
def rates(
  rows: Sequence[dict],
  chosen: dict[str, float] | None = None,
  designs: Sequence[str] = (),
) -> Figure | None:
  """Draws held-out loss against learning rate, the chosen rates ringed.

  The line of the means breaks where a run diverged; such runs are crosses at
  the top, a level a design.
  """
  looks = style.looks((row['variant'] for row in rows), designs)
  if not rows:
    return None
  bad = {r['variant'] for r in rows if not _finite(r['heldout_nats'])}
  height = PANEL[1] * 1.2 + style.LEVEL * len(bad)
  figure, axes = style.subplots(1, 1, PANEL[0] * 1.5, height)
  axis = axes[0, 0]
  diverged = {}
  for number, (design, look) in enumerate(looks.items()):
    by_rate: dict[float, list[float]] = {}
    for row in rows:
      if row['variant'] == design:
        loss = style.number(row['heldout_nats'])
        by_rate.setdefault(row['lr'], []).append(loss)
    shift = 1.02 ** (number - (len(looks) - 1) / 2)
    points = sorted(by_rate.items())
    where = [rate * shift for rate, _ in points]
    means = [style.interval(losses)[0] for _, losses in points]
    _dots(axis, where, [losses for _, losses in points], look)
    axis.plot(where, means, color=look.color, **_line(look), zorder=3)
    diverged[look] = [
      (x, sum(not math.isfinite(loss) for loss in losses))
      for x, (_, losses) in zip(where, points, strict=True)
    ]
    ring = (chosen or {}).get(design)
    for x, mean, (rate, _) in zip(where, means, points, strict=True):
      if rate == ring and math.isfinite(mean):
        axis.plot([x], [mean], markersize=12, zorder=5, **RING)
  axis.set_xscale('log')
  style.plain_ticks(axis, [row['lr'] for row in rows])
  diverged = {k: [(x, c) for x, c in v if c] for k, v in diverged.items()}
  style.top_strip(axis, diverged)
  style.label(axis, '', 'learning rate', 'held-out loss (nats / token)')
  handles = [style.handle(look) for look in looks.values()]
  if chosen:
    handles.append(Line2D([], [], label='chosen rate', markersize=9, **RING))
  if any(diverged.values()):
    cross = {'marker': 'x', 'linestyle': '', 'color': 'black'}
    handles.append(Line2D([], [], label='not finite (runs)', **cross))
  style.legend(figure, handles)
  return figure


RING: dict[str, Any] = {
  'marker': 'o',
  'fillstyle': 'none',
  'color': 'black',
  'linestyle': '',
  'markeredgewidth': 0.8,
}
PANEL = (3.5, 2.7)  # inches


def _finite(value) -> bool:
  return math.isfinite(style.number(value))


def _line(look):
  return {'linestyle': look.line, 'marker': look.marker}


def _dots(axis, where, values, look):
  """The single runs, small."""
  x = [x for x, several in zip(where, values, strict=True) for _ in several]
  y = [value for several in values for value in several]
  kept = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
  if kept:
    plain = {'marker': '.', 'markersize': 3.5, 'linestyle': '', 'alpha': 0.6}
    axis.plot(*zip(*kept, strict=True), color=look.color, **plain)


@style.styled
def over_compute(
  curves: Sequence[dict], designs: Sequence[str] = ()
) -> Figure | None:
  """Draws gaps with their intervals against training FLOPs and tokens.

  The band of a fit lies over FLOPs, edged by the curve's line style. A second
  curve of one design has hollow markers and the line of what it is against.
  Sizes that all had as many tokens have no part over tokens.
  """
  curves = [one for one in curves if len(one['mean'])]
  names = [name for one in curves for name in (one['kind'], one['other'])]
  looks = style.looks(names, designs)
  if not curves:
    return None
  tokens = {t for one in curves for t in one['tokens']}
  parts = ('flops', 'tokens') if len(tokens) > 1 else ('flops',)
  size = (style.PAGE * len(parts) / 2, PANEL[1] * 1.1)
  figure, axes = style.subplots(1, len(parts), *size, sharey=True)
  handles, seen = [], set()
  for number, one in enumerate(curves):
    look, other = looks[one['kind']], looks[one['other']]
    text = f'{style.short(one["kind"])} - {style.short(one["other"])}'
    look = look._replace(label=text)
    fill = {}
    if one['kind'] in seen:
      look, fill = look._replace(line=other.line), {'fillstyle': 'none'}
    seen.add(one['kind'])
    shift = 1.015 ** (number - (len(curves) - 1) / 2)
    for axis, key in zip(axes[0], parts, strict=True):
      _gap_curve(axis, one, key, shift, look, fill)
    if one['band'] is not None and len(one['band']):
      x, low, high = style.numbers(one['band']).T
      axes[0, 0].fill_between(10**x, low, high, color=look.color, alpha=0.13)
      for edge in (low, high):
        axes[0, 0].plot(
          10**x, edge, color=look.color, linestyle=look.line, linewidth=0.6
        )
    handles.append(style.handle(look, **fill))
  for axis, part in zip(axes[0], parts, strict=True):
    axis.axhline(0, color='black', linewidth=0.8, zorder=1)
    axis.set_xscale('log')
    style.label(axis, '', f'training {part.replace("flops", "FLOPs")}', '')
  axes[0, 0].set_ylabel('gap in held-out loss (nats / token)')
  style.legend(figure, handles)
  return figure


def _gap_curve(axis, one, key, shift, look, fill):
  x = style.numbers(one[key]) * shift
  mean, low, high = (style.numbers(one[k]) for k in ('mean', 'low', 'high'))
  kept = np.isfinite(x) & np.isfinite(mean)
  bars = np.nan_to_num(np.stack([mean - low, high - mean]))[:, kept]
  axis.errorbar(
    x[kept],
    mean[kept],
    bars,
    color=look.color,
    capsize=2.5,
    elinewidth=0.9,
    **_line(look),
    **fill,
  )
