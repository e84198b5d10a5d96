"""Which levels of a task the designs solve, and after how many steps.

A level is solved by a run when, at an evaluation, a share `results.SOLVED` of
its questions is answered right. Whether a small network gets there is a matter
of luck as much as of degree: seeds are counted, not averaged.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from mhc.experiments import figure_style as style
from mhc.experiments import html
from mhc.experiments import results
from mhc.experiments import sections
from mhc.experiments.claims import share
from mhc.runtime import paths

Rows = Sequence[dict[str, Any]]


def section(workdir: paths.Path, name: str, rows: Rows) -> list[html.Block]:
  """A table of a panel whose text is a task, and curves of its levels."""
  rows = [row for row in rows if row['panel'] == name and row['solved']]
  if not rows:
    return []
  levels = [*rows[0]['solved']]
  groups: dict[tuple[str, str], list] = {}
  for row in rows:
    setting = style.setting_words(row['setting'])
    groups.setdefault((setting, row['variant']), []).append(row)
  lines = [
    [setting, style.short(design), *(_cell(group, level) for level in levels)]
    for (setting, design), group in groups.items()
  ]
  return [
    html.Heading(2, f'{name}: levels solved'),
    f'Seeds that answer {results.SOLVED:.0%} of the questions of a level right '
    'at some evaluation, with the interval of Clopper and Pearson; '
    'below, after how many steps (the middle one of those that do).',
    html.Table(
      ['setting', 'design', *(_header(rows[0], level) for level in levels)],
      lines,
      numeric=False,
    ),
    *sections.drawn(
      workdir,
      f'solved_{name}',
      curves(rows),
      'The share of seeds that have solved a level, over the steps.',
    ),
  ]


def _header(row, level) -> str:
  return f'level {level} ({row["chance"][level]:.2g} by chance)'


def _cell(group, level) -> str:
  when = [row['solved'][level] for row in group]
  when = sorted(step for step in when if step is not None)
  text = share(len(when), len(group))
  return f'{text}, {when[len(when) // 2]:,} steps' if when else text


@style.styled
def curves(rows: Rows, designs: Sequence[str] = ()) -> Figure | None:
  """Draws the share of seeds that have solved a level, over the steps.

  A line of panels a setting, a panel a level.
  """
  if not rows:
    return None
  levels = [*rows[0]['solved']]
  settings = [*dict.fromkeys(style.setting_words(r['setting']) for r in rows)]
  looks = style.looks((row['variant'] for row in rows), designs)
  last = max(row['steps'] for row in rows)
  size = max(3.5, 2.3 * len(levels)), 0.5 + 1.7 * len(settings)
  figure, axes = style.subplots(
    len(settings), len(levels), *size, sharex=True, sharey=True
  )
  for line, setting in zip(axes, settings, strict=True):
    here = [r for r in rows if style.setting_words(r['setting']) == setting]
    for axis, level in zip(line, levels, strict=True):
      for number, (design, look) in enumerate(looks.items()):
        when = [r['solved'][level] for r in here if r['variant'] == design]
        if when:
          # Lines on top of each other would be one.
          shift = 0.012 * (number - (len(looks) - 1) / 2)
          x, y = survival(when, last)
          axis.step(
            x, y + shift, where='post', color=look.color, linestyle=look.line
          )
      style.label(axis, f'{setting}: level {level}', 'step', 'share of seeds')
      axis.set_ylim(-0.08, 1.08)
  style.legend(
    figure, [style.handle(look, marker='') for look in looks.values()]
  )
  return figure


def survival(
  when: Sequence[int | None], last: int
) -> tuple[np.ndarray, np.ndarray]:
  """Steps, and the share of runs that have got there by each.

  Every run is watched to the last step: nothing is censored before it.
  """
  done = sorted(step for step in when if step is not None)
  x = np.array([0, *done, last])
  y = np.array([0, *range(1, len(done) + 1), len(done)]) / len(when)
  return x, y
