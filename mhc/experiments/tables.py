"""The part of a report for one panel: a table, the claims and the figures."""

from collections.abc import Sequence
import pathlib

import numpy as np

from mhc.config import comparison as comparison_lib
from mhc.experiments import claims
from mhc.experiments import contrasts
from mhc.experiments import figure_style
from mhc.experiments import html
from mhc.experiments import plots
from mhc.experiments import results
from mhc.runtime import paths

# A panel of more settings has figures over its axes, and none of a setting.
DETAILED = 2


def ffn(model) -> str:
  moe = model.moe
  if not moe.num_experts:
    return f'FFN {model.ffn_dim}'
  return (
    f'{moe.experts_per_token} of {moe.num_experts} experts and '
    f'{moe.num_shared} shared of width {moe.expert_dim} '
    f'({moe.num_dense_blocks} dense block in front, {model.ffn_dim})'
  )


def panel(
  workdir: paths.Path,
  comparison: comparison_lib.Comparison,
  name: str,
  runs: Sequence[results.Run],
  rows: Sequence[dict],
  judged: Sequence[contrasts.Judged],
) -> list[html.Block]:
  """A panel: each setting's table and claims, and its figures where few."""
  p = comparison.panels[name]
  parts: list[html.Block] = [html.Heading(2, p.title or name)]
  rows = [row for row in rows if row['panel'] == name]
  settings = [*comparison.settings(name)]
  for setting in settings:
    here = [r for r in runs if comparison_lib.stands_for(r.setting, setting)]
    if not here:
      continue
    config, summary = here[0].config, here[0].summary
    clip = config.optimizer.clip_norm
    seeds = dict.fromkeys(str(run.config.seed) for run in here)
    inner: list[html.Block] = [
      f'{config.model.num_blocks} blocks ({2 * config.model.num_blocks} '
      f'sub-layers), learning rate {config.optimizer.learning_rate:g}, '
      f'{config.num_steps} steps of {config.tokens_per_step} tokens '
      f'({summary["epochs"]:.2g} epochs), '
      f'{f"gradients clipped at {clip:g}" if clip else "no clipping"}, '
      f'seeds {", ".join(seeds)}; held-out loss over '
      f'{summary["heldout_rows"] * config.data.targets_per_row:,} tokens.'
    ]
    selected = comparison_lib.rows_at(rows, setting)
    inner.append(_table(selected))
    claimed = claims.evaluate(
      selected,
      [
        j
        for j in judged
        if j.contrast.panel == name
        and tuple(j.contrast.setting.items()) == setting
        and j.contrast.declared
      ],
    )
    if claimed and p.role == 'report':
      header = ['Claim', 'Paper', 'Here', 'Verdict']
      inner.append(html.Table(header, [[*c] for c in claimed], numeric=False))
    if p.role != 'tune' and len(settings) <= DETAILED:
      inner += _figures(workdir, name, setting, here)
    if p.role == 'report' and len(p.all_axes) <= 2:
      parts += inner
    else:
      parts.append(
        html.Details(figure_style.setting_words(dict(setting)) or name, inner)
      )
  return parts


def _figures(workdir, name, setting, runs) -> list[html.Block]:
  label = '-'.join(f'{a.rpartition(".")[2]}={v}' for a, v in setting) or 'all'
  folder = pathlib.Path('figures') / name / label.replace('/', '_')
  drawn = plots.draw_all(runs, workdir / folder)
  return [html.Figure(str(folder / file), text) for file, text in drawn.items()]


def _table(rows) -> html.Table:
  """One row per kind: means over seeds, or their median and range."""
  lines = []
  for kind in dict.fromkeys(row['variant'] for row in rows):
    group = [row for row in rows if row['variant'] == kind]

    def column(name, reduce=np.mean, group=group):
      values = [row[name] for row in group if row[name] is not None]
      return float(reduce(values)) if values else None

    def spread(name, group=group):
      found = [row[name] for row in group]
      values = [v if np.isfinite(v) else np.inf for v in found]
      middle = claims.number(float(np.median(values)))
      least, largest = map(claims.number, (min(values), max(values)))
      if least == largest:
        return middle
      return f'{middle} ({least} to {largest})'

    def counted(name, group=group):
      counts = [row[name] for row in group]
      runs = sum(count > 0 for count in counts)
      return f'{sum(counts)} in {runs} of {len(counts)}' if runs else '0'

    heldout = [row['heldout_nats'] for row in group]
    lines.append(
      [
        figure_style.short(kind),
        _fixed(column('train_nats_last_25'), 3),
        f'{np.mean(heldout):.4f}'
        + (
          f' ({min(heldout):.3f}-{max(heldout):.3f})' if len(group) > 1 else ''
        ),
        _fixed(column('bits_per_byte'), 3),
        _fixed(column('gap_nats'), 4, sign=True),
        _fixed(column('stream_cosine', np.median), 4),
        spread('gain_fwd_max'),
        spread('gain_bwd_max'),
        claims.number(column('grad_norm_mean')),
        spread('grad_norm_cv'),
        spread('grad_norm_max'),
        counted('grad_spikes'),
        counted('loss_spikes'),
        _fixed(column('step_time_ratio', np.median), 2),
        _fixed(column('peak_bytes_ratio'), 2),
        _fixed(column('params_ratio'), 2),
        _fixed(column('load_max_over_mean'), 2),
      ]
    )
  header = [
    'connection',
    'train loss, last 25 steps (nats)',
    'held-out loss (nats)',
    'bits per byte',
    'gap',
    'cosine of streams',
    'gain fwd',
    'gain bwd',
    'grad norm',
    'its variation',
    'its max',
    'its spikes',
    'loss spikes',
    'step time',
    'memory',
    'parameters',
    'expert load',
  ]
  if all(row['load_max_over_mean'] is None for row in rows):
    header, lines = header[:-1], [line[:-1] for line in lines]
  return html.Table(header, lines)


def notes() -> list[html.Block]:
  return [
    html.Heading(2, 'How to read this'),
    'Losses are means over seeds, with the range of the held-out loss in '
    'parentheses; `gap` is to the plain residual of the same seed. Gains are '
    'the Amax gain magnitudes of the mHC paper (Sec. 3.1): the largest '
    'absolute row sum (forward) or column sum (backward) of the product of '
    'all H_res, averaged over the tokens of the probe, maximum over depth and '
    'probes; median and range over seeds. The cosine is of pairs of streams '
    'where a sub-layer reads, median over depth and seeds at the end: near 1 '
    'the n streams are one, and nothing can be said of mixing them. The '
    'gradient norm is taken before clipping, over the steps after warm-up: its '
    'mean, and its coefficient of variation over these steps and its maximum, '
    'median and range over seeds; a spike is a step above '
    f'{results.GRAD_SPIKE_FACTOR:g} times the median of the {results.WINDOW} '
    'steps before it, a loss spike one more than '
    f'{results.LOSS_SPIKE_NATS:g} nat above that median; "5 in 2 of 4" are '
    'five in two of four runs. Values by seed are in results.csv. Step time '
    '(median), memory (XLA: arguments, temporaries and outputs of one update) '
    'and parameters are ratios to the residual. '
    'Step times come from runs one after the other on a machine that may be '
    'busy.',
    'Contrasts of losses are corrected together. Verdicts on gains, on the '
    'variation of the gradient norm and on spikes are each at 5 %, without '
    'correction for their number.',
    'These models are small and the text is one corpus: read the figures as '
    'phenomena, not as rankings. Numbers of every run: `results.json`; of '
    'every step: `metrics.jsonl` in the folders of the runs.',
  ]


def _fixed(value, digits, sign=False):
  return '' if value is None else f'{value:{"+" if sign else ""}.{digits}f}'
