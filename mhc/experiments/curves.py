"""Gaps and compute multipliers over sizes: panels that share a `curve`.

Each panel and setting of a curve is a size; its compute is the plain residual's
training FLOPs. A trend needs two sizes, a compute multiplier four.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhc.config import comparison as comparison_lib
from mhc.experiments import figure_style
from mhc.experiments import figures
from mhc.experiments import html
from mhc.experiments import scaling
from mhc.experiments import sections
from mhc.experiments import statistics
from mhc.experiments.claims import number
from mhc.runtime import paths


def collect(
  comparison: comparison_lib.Comparison,
  rows: Sequence[dict],
  timings: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """A curve for each name and design that has been trained beside residuals."""
  names = dict.fromkeys(p.curve for p in comparison.panels.values() if p.curve)
  found = []
  for name in names:
    sizes = [
      comparison_lib.rows_at(
        [row for row in rows if row['panel'] == panel], setting
      )
      for panel, p in comparison.panels.items()
      if p.curve == name
      for setting in comparison.settings(panel)
    ]
    designs = dict.fromkeys(r['variant'] for size in sizes for r in size)
    for design in designs:
      if design != 'residual':
        curve = _curve(name, design, sizes, comparison, timings)
        if curve is not None:
          found.append(curve)
  return found


def _curve(name, design, sizes, comparison, timings) -> dict[str, Any] | None:
  points = [p for size in sizes if (p := _point(design, size)) is not None]
  points.sort(key=lambda point: point['flops'])
  if len(points) < 2 or min(len(p['seeds']) for p in points) < 2:
    return None
  flops = [p['flops'] for p in points]
  losses = [np.array([p['base'], p['losses']]) for p in points]
  gaps = [both[1] - both[0] for both in losses]
  each = [statistics.paired(g, margin=1.0) for g in gaps]
  trend = scaling.trend(flops, gaps)
  curve = {
    'curve': name,
    'kind': design,
    'other': 'residual',
    'flops': flops,
    'tokens': [p['tokens'] for p in points],
    'seeds': [len(p['seeds']) for p in points],
    'mean': [e.mean for e in each],
    'low': [e.low for e in each],
    'high': [e.high for e in each],
    'slope': [*trend.slope],
    'verdict': trend.verdict,
    'band': trend.band.tolist(),
    'multipliers': {},
  }
  if len(points) >= scaling.MIN_SIZES:
    ratios = {'FLOPs': [p['flops_ratio'] for p in points]}
    measured = [timings.get(p['panel'], {}).get(design) for p in points]
    if all(m and 'ratio' in m for m in measured):
      ratios['time, measured'] = [m['ratio'][0] for m in measured]
    for one, where, ratio in comparison.planned_overhead:
      if one == design:
        ratios[f'time, as planned for {where}'] = [ratio] * len(points)
    curve['multipliers'] = {
      what: [*scaling.multiplier(flops, ratio, losses).overall]
      for what, ratio in ratios.items()
    }
  return curve


def _point(design, rows) -> dict[str, Any] | None:
  """The losses of a design and of the residual at one size, by seed."""
  sides = [
    {r['seed']: r for r in rows if r['variant'] == one}
    for one in ('residual', design)
  ]
  seeds = [
    seed
    for seed in sorted(sides[0].keys() & sides[1].keys())
    if all(np.isfinite(side[seed]['heldout_nats']) for side in sides)
  ]
  if not seeds:
    return None
  base, own = ([side[s]['heldout_nats'] for s in seeds] for side in sides)
  first = sides[0][seeds[0]]
  return {
    'panel': first['panel'],
    'seeds': seeds,
    'flops': first['flops'],
    'tokens': first['tokens'],
    'flops_ratio': sides[1][seeds[0]]['flops'] / first['flops'],
    'base': base,
    'losses': own,
  }


def section(
  workdir: paths.Path, curves: Sequence[dict[str, Any]]
) -> list[html.Block]:
  """Gap against compute and tokens, and what a design is worth in compute."""
  if not curves:
    return []
  lines = []
  for c in curves:
    missing = f'not tested (fewer than {scaling.MIN_SIZES} sizes)'
    lines.append(
      [
        f'{figure_style.short(c["kind"])} - {figure_style.short(c["other"])}',
        ', '.join(map(str, c['seeds'])),
        '{:+.4f} [{:+.4f}, {:+.4f}]'.format(*c['slope']),
        c['verdict'],
        '; '.join(
          f'{what}: {_times(interval)}'
          for what, interval in c['multipliers'].items()
        )
        or missing,
      ]
    )
  header = [
    'gap',
    'seeds by size',
    'slope, nats a decade of compute',
    'verdict',
    'compute multiplier [95 %]',
  ]
  return [
    html.Heading(2, 'Over sizes'),
    "The slope is of a line through the gaps over log10 of the residual's "
    'training FLOPs; the compute multiplier is the compute at which the '
    "residual's fitted law (floor + scale compute^-exponent) has a design's "
    "loss, over the design's own, in FLOPs or in time. Intervals by a "
    'bootstrap over seeds.',
    html.Table(header, lines, numeric=False),
    *sections.drawn(
      workdir,
      'over_compute',
      figures.over_compute(list(curves)),
      'Gap to the plain residual against training compute and tokens, with '
      '95 % intervals and the band of the line.',
    ),
  ]


def _times(interval) -> str:
  value, low, high = map(number, interval)
  return f'{value} [{low}, {high}]'
