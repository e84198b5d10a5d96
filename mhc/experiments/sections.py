"""The sections of a report, from the rows, contrasts and runs to blocks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mhc.experiments import contrasts as contrasts_lib
from mhc.experiments import figure_style
from mhc.experiments import figures
from mhc.experiments import figures_depth
from mhc.experiments import figures_heat
from mhc.experiments import results
from mhc.experiments.html import Block
from mhc.experiments.html import Figure
from mhc.experiments.html import Heading
from mhc.experiments.html import Table
from mhc.runtime import paths

Rows = Sequence[dict[str, Any]]


def contrast_table(found: Rows) -> list[Block]:
  """Section 2: one line a contrast, declared ones first."""
  header = [
    'panel',
    'contrast',
    'gap [95 %]',
    'for other text',
    'p (Holm)',
    'p by signs',
    'below 0',
    'could see',
    'cosine',
    'verdict',
  ]
  lines = [
    [
      f'{c["panel"]}: {figure_style.setting_words(c["setting"])}',
      f'{figure_style.short(c["kind"])} - {figure_style.short(c["other"])}',
      gap(c),
      '' if not c['crossed'] else '[{:+.4f}, {:+.4f}]'.format(*c['crossed']),
      _p(c['p_holm']),
      _p(c['p_sign_flip']),
      '' if c['n'] is None else f'{c["num_below"]} of {c["n"]}',
      '' if c['mde'] is None else f'{c["mde"]:.4f}',
      '' if c['cosine'] is None else f'{c["cosine"]:.3f}',
      c['verdict'] or 'exploratory',
    ]
    for c in sorted(found, key=lambda c: not c['declared'])
  ]
  return [
    Heading(2, 'Contrasts'),
    'Held-out loss of the first design minus that of the second, nats a '
    'token, paired by seed. Intervals are by t over seeds; those for other '
    'text also take the sampling of the held-out text into account. A '
    'comparison could see the true difference that 4 of 5 like it find at '
    'their level. p by signs is exact without assumptions; with N seeds it is '
    'at least 2^(1-N). The cosine is that of the streams: near 1 they are one.',
    Table(header, lines, numeric=False),
  ]


def gap(c: dict[str, Any]) -> str:
  """'+0.0123 [+0.0100, +0.0146]', or the differences where there is none."""
  if c['mean'] is None:
    return ' / '.join(
      'not finite' if d is None else f'{d:+.4f}' for d in c['differences']
    )
  return f'{c["mean"]:+.4f} [{c["low"]:+.4f}, {c["high"]:+.4f}]'


def _p(value) -> str:
  return (
    '' if value is None else f'{value:.2g}' if value < 0.1 else f'{value:.2f}'
  )


def drawn(workdir: paths.Path, name: str, figure, caption: str) -> list[Block]:
  """A figure as PNG and PDF; nothing for None."""
  if figure is None:
    return []
  file = figure_style.save(figure, workdir / 'figures', name)
  return [Figure(f'figures/{file}', caption)]


def tuning(workdir, rows: Rows, choices) -> list[Block]:
  """Section 4: learning rates."""
  parts: list[Block] = []
  for panel, chosen in choices.items():
    here = [row for row in rows if row['panel'] == panel]
    lines = [
      [
        figure_style.short(design),
        f'{choice.rate:g}',
        'at the edge of the grid: not used for verdicts'
        if choice.at_edge
        else '',
        ' / '.join(f'{r:g}: {v:.3f}' for r, v in choice.losses.items()),
        f'{choice.sensitivity:.3f}',
      ]
      for design, choice in chosen.items()
    ]
    header = ['design', 'chosen rate', '', 'mean loss by rate', 'sensitivity']
    parts += [
      'Chosen on seeds that are not reported. Sensitivity is the mean over the '
      'grid of what a rate loses against the best one, a diverged run counting '
      'as the loss of a model that knows nothing (after arXiv 2309.14322).',
      Table(header, lines, numeric=False),
      *drawn(
        workdir,
        f'rates_{panel}',
        figures.rates(here, {d: c.rate for d, c in chosen.items()}),
        'Held-out loss against the learning rate; dots are seeds, rings the '
        'chosen rates, crosses runs that diverged.',
      ),
    ]
  return [Heading(2, 'Learning rates'), *parts] if parts else []


def profiles(runs: Sequence[results.Run]) -> list[dict[str, Any]]:
  """Quantities over depth by design, means over seeds; first and last probe."""
  by_design: dict[str, list[results.Run]] = {}
  for run in runs:
    if run.kind != 'residual' and 'sigma_diff_fwd' in run.probes[-1]:
      by_design.setdefault(run.variant, []).append(run)
  found = []
  for design, group in by_design.items():

    def mean(name, at=-1, group=group):
      return np.mean([run.probe(name)[at] for run in group], axis=0).tolist()

    found.append(
      {
        'design': design,
        'first_step': group[0].probes[0]['step'],
        'sigma_diff_init': mean('sigma_diff_fwd', 0),
        'sigma_diff': mean('sigma_diff_fwd'),
        'effective_rank': mean('effective_rank'),
        'entropy': mean('entropy'),
        'pre_mean': mean('pre_mean'),
        'post_mean': mean('post_mean'),
        'streams_read': mean('streams_read'),
      }
    )
  return found


def contraction(workdir, name, found) -> list[Block]:
  """Section 7: what is left of the streams' differences."""
  if not found:
    return []
  return [
    *drawn(
      workdir,
      f'contraction_{name}',
      figures_depth.contraction(found),
      'Left: the largest factor by which H_l ... H_1 keeps a difference of the '
      'streams, mean over tokens, at the end and (dotted) at the first probe; '
      'the line is 0.98^l, as write-ups have it. Middle: effective rank of the '
      'product. Right: entropy of its rows, 1 when all streams are averaged.',
    ),
    *drawn(
      workdir,
      f'reads_{name}',
      figures_heat.reads(found),
      'H_pre and H_post by stream and sub-layer, means over tokens, and the '
      'effective number of streams that a sub-layer reads.',
    ),
  ]


def goodput(rows: Rows) -> list[Block]:
  """Section 13: the share of the runs' time that trained, and what was lost."""
  groups: dict[tuple[str, str], list] = {}
  for row in rows:
    if row['goodput'] is not None:
      groups.setdefault((row['panel'], row['variant']), []).append(row)
  if not groups:
    return []
  lines = [
    [
      panel,
      figure_style.short(design),
      f'{sum(row["wall_s"] for row in group) / 60:.1f}',
      f'{np.median([row["goodput"] for row in group]):.0%}',
      str(sum(row['starts'] for row in group)),
      str(sum(row['lost_steps'] for row in group)),
    ]
    for (panel, design), group in groups.items()
  ]
  return [
    Heading(2, 'Goodput'),
    "The share of a run's time, since its first start, that trained steps "
    'which still count (median over runs). The rest is imports, compilation, '
    'evaluation, probes, saves, restarts, and steps that a kill or a rollback '
    "has thrown away; timeline.jsonl in a run's folder has the seconds.",
    Table(
      ['panel', 'design', 'minutes', 'goodput', 'starts', 'lost steps'], lines
    ),
  ]


def cost(rows: Rows, timings) -> list[Block]:
  """Section 12: step time in turn, memory, parameters, FLOPs."""
  lines = []
  for panel, found in timings.items():
    for design, each in found.items():
      if design == 'device' or 'ratio' not in each:
        continue
      own = [r for r in rows if r['panel'] == panel and r['variant'] == design]
      if not own:
        continue  # timed, not yet trained
      one = own[0]
      middle, low, high = each['ratio']
      lines.append(
        [
          panel,
          figure_style.short(design),
          f'{1e3 * each["step_s"]:.1f}',
          f'{middle:.2f} [{low:.2f}, {high:.2f}]',
          _ratio(one['peak_bytes_ratio']),
          _ratio(one['params_ratio']),
          _ratio(one['flops_ratio']),
        ]
      )
  if not lines:
    return []
  return [
    Heading(2, 'Cost'),
    'Step times are measured in turn, round by round, on one worker while '
    'others may train beside it; the ratio is to the plain residual in the '
    'same round, its median and range over rounds. Memory is counted by XLA '
    '(arguments, temporaries and outputs of one update), parameters and FLOPs '
    'by the program. At this width the connections are a large part of the '
    "work: the ratios do not carry over to the paper's models (docs/pods.md).",
    Table(
      [
        *('panel', 'design', 'step (ms)', 'step time', 'memory'),
        *('parameters', 'FLOPs'),
      ],
      lines,
    ),
  ]


def _ratio(value) -> str:
  return '' if value is None else f'{value:.3f}'


def capabilities() -> list[Block]:
  """Section 11."""
  return [
    Heading(2, 'Capabilities'),
    'The benchmarks of the paper (Table 4) are not comparable at this size: '
    'models of so few bytes of text answer at chance.',
  ]


def axes(workdir, comparison, rows: Rows) -> list[Block]:
  """Sections 9 and 10: figures over the axes of panels that explore."""
  parts: list[Block] = []
  for name, panel in comparison.panels.items():
    here = [row for row in rows if row['panel'] == name]
    varied = [axis for axis, values in panel.all_axes if len(values) > 1]
    if panel.role == 'tune' or not here:
      continue
    if {*varied} == {'model.num_blocks', 'optimizer.learning_rate'}:
      parts += drawn(
        workdir,
        f'stability_{name}',
        figures_heat.stability(here),
        f'{panel.title or name}: runs whose loss spikes or is not finite, of '
        'all, with the interval of Clopper and Pearson.',
      )
    elif len(varied) == 1:
      if varied == ['model.num_blocks']:
        parts += drawn(
          workdir,
          f'depth_{name}',
          figures_depth.depth(_by_depth(here)),
          f'{panel.title or name}: what H_L ... H_1 keeps of a difference of '
          'the streams, and the sub-layers in which it halves; the line is '
          '0.98^L, as write-ups have it.',
        )
      parts += drawn(
        workdir,
        f'axis_{name}',
        figures_depth.over_axis(here, varied[0], list(panel.kinds)),
        f'{panel.title or name}: over {varied[0]}, dots are seeds, bars 95 % '
        'intervals.',
      )
  return [Heading(2, 'Over axes'), *parts] if parts else []


def _by_depth(rows) -> list[dict[str, Any]]:
  """Contraction by depth of each design with streams, means over seeds."""
  points = []
  wide = [row for row in rows if row['sigma_diff'] and row['num_streams'] > 1]
  for design in dict.fromkeys(row['variant'] for row in wide):
    own = [row for row in wide if row['variant'] == design]
    blocks = sorted({row['blocks'] for row in own})
    at = [[r for r in own if r['blocks'] == depth] for depth in blocks]
    points.append(
      {
        'design': design,
        'blocks': blocks,
        'sigma_diff': [np.mean([r['sigma_diff'] for r in g]) for g in at],
        # None stands for differences that never halve.
        'half_life': [
          None if None in lives else float(np.median(lives))
          for g in at
          for lives in [[r['half_life'] for r in g]]
        ],
      }
    )
  return points


def ablation(workdir, comparison, found: Rows) -> list[Block]:
  """Section 8: the parts of a connection, as in Table 1 of the paper."""
  paths = {p: f'model.connection.{p}' for p in ('pre', 'post', 'res')}
  cells = []
  for c in found:
    designs = {
      name: dict(own) for name, own in comparison.panels[c['panel']].designs
    }
    own = designs.get(c['kind'])
    varied = {path for other in designs.values() for path in other}
    if c['other'] == 'residual' and own and varied & {*paths.values()}:
      kind = own['model.connection.kind']
      parts = {part: own.get(path, 'dynamic') for part, path in paths.items()}
      cells.append({'kind': kind, **parts, **_estimates(c)})
  if not cells:
    return []
  return [
    Heading(2, 'Parts of a connection'),
    *drawn(
      workdir,
      'ablation',
      figures_heat.ablation(cells),
      'Gap to the plain residual with each mapping dynamic, static or off '
      '(H_pre = 1/n, H_post = 1, H_res = I), with 95 % intervals.',
    ),
  ]


def _estimates(c):
  return {name: c[name] for name in ('mean', 'low', 'high')}


def forest(workdir, found: Rows) -> list[Block]:
  """Section 3: declared contrasts, and explored ones at a single setting.

  Those over an axis have a figure of their own (`axes`).
  """
  settings: dict[str, list[Any]] = {}
  for c in found:
    seen = settings.setdefault(c['panel'], [])
    if c['setting'] not in seen:
      seen.append(c['setting'])
  shown = [c for c in found if c['declared'] or len(settings[c['panel']]) == 1]
  return drawn(
    workdir,
    'forest',
    figures.forest(shown),
    'Gaps of held-out loss: dots are seeds, bars 95 % intervals, the band is '
    'the margin within which designs count as equivalent. Contrasts over an '
    'axis are in the figures of the axes.',
  )


def verdict_lines(judged: Sequence[contrasts_lib.Judged]) -> list[str]:
  """The verdicts for the terminal."""
  lines = []
  for contrast, verdict in ((j.contrast, j.verdict) for j in judged):
    if contrast.declared:
      first, other = map(figure_style.short, (contrast.kind, contrast.other))
      setting = figure_style.setting_words(contrast.setting)
      lines.append(
        f'{contrast.panel}: {first} against {other}, {setting}: {verdict}'
      )
  return lines
