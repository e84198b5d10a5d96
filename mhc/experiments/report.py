"""The comparison's report: results.json, report.md, report.html, figures.

Everything is computed from the runs' files, so a report can be rebuilt at any
time.
"""

import json
import pathlib

import numpy as np

from mhc.experiments import claims
from mhc.experiments import contrasts
from mhc.experiments import events
from mhc.experiments import html
from mhc.experiments import plots
from mhc.experiments import results
from mhc.experiments import statistics
from mhc.runtime import files

TITLE = 'Residual designs compared'


def render(workdir: pathlib.Path) -> list[dict]:
  """Writes the report of the comparison in `workdir`; returns its rows.

  Raises:
    ValueError: `workdir` holds no comparison, or no finished run of it.
  """
  comparison, panels, unfinished = results.read_comparison(workdir)
  if not any(panels.values()):
    raise ValueError(
      f'{workdir} holds no finished run: run without --report_only first'
    )
  rows, parts = [], []
  for name, runs in panels.items():
    if runs:
      panel_rows = results.rows(name, runs)
      rows += panel_rows
      title = comparison.panels[name].title or name
      parts += _panel(workdir, name, title, runs, panel_rows)
  parts += _loads(workdir, panels)
  parts += _events(workdir, panels, rows)
  parts = [*_introduction(comparison, panels, unfinished), *parts, *_notes()]
  (workdir / 'results.json').write_text(
    json.dumps(files.jsonable(rows), indent=2) + '\n'
  )
  (workdir / 'report.md').write_text(html.markdown(parts))
  (workdir / 'report.html').write_text(html.html(TITLE, parts, workdir))
  return rows


def _loads(workdir, panels) -> list[html.Block]:
  """One figure across panels, where more than one has experts."""
  routed = {
    name: runs
    for name, runs in panels.items()
    if runs and runs[0].config.model.moe.num_experts
  }
  if len(routed) < 2:
    return []
  (workdir / 'figures').mkdir(parents=True, exist_ok=True)
  plots.loads_of_panels(routed).savefig(
    workdir / 'figures' / 'expert_load.png', dpi=110
  )
  return [
    html.Heading(2, 'Expert load of the panels'),
    html.Figure(
      'figures/expert_load.png',
      'Largest expert load over the mean load of a batch; 1 is even. Thin: '
      'every step; thick: means of 25 steps.',
    ),
  ]


def _events(workdir, panels, rows) -> list[html.Block]:
  parts: list[html.Block] = [
    html.Heading(2, 'Events'),
    'Alerts of the guards in each run, the actions taken, and checkpoints that '
    'could not be saved (`events.jsonl`): an event is recorded when an alert '
    'begins, not again while it lasts. Guards of the loss check every step, '
    'the others every probe. Skipped updates are those among the steps that '
    'were not rolled back.',
    html.Table(
      events.SUMMARY_HEADER,
      events.summary_table(rows, plots.LABELS),
      numeric=False,
    ),
  ]
  figure = plots.first_events(panels)
  if figure is not None:
    file = 'figures/events.png'
    figure.savefig(workdir / file, dpi=110)
    parts.append(
      html.Figure(
        file,
        'Training loss and the first event of each guard, in the run of each '
        'panel with most loss spikes. The dot is the first spike as the tables '
        f'count them, more than {results.LOSS_SPIKE_NATS:g} nat above the '
        f'median of {results.WINDOW} steps; crosses are steps that were rolled '
        'back.',
      )
    )
  for name, runs in panels.items():
    for run in runs:
      if run.events:
        blocks, rate = run.comparison_key
        number = len(run.events)
        parts.append(
          html.Details(
            f'{name}: {plots.LABELS[run.kind]}, {blocks} blocks, learning rate '
            f'{rate:g}, seed {run.config.seed}: {number} '
            f'event{"s" * (number > 1)}',
            html.Table(
              events.HEADER, events.table_rows(run.events), numeric=False
            ),
          )
        )
  if not any(isinstance(part, html.Details) for part in parts):
    parts.append('No events.')
  return parts


def summary(rows: list[dict]) -> str:
  """Formats the rows' main figures for the terminal, means over seeds."""
  lines = [
    f'{"panel":<8} {"connection":<10} {"blocks":>6} {"lr":>7} {"held-out":>9} '
    f'{"gap":>8} {"gain fwd":>9} {"gain bwd":>9} {"grad spikes":>12}'
  ]
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    key = row['panel'], row['variant'], row['blocks'], row['lr']
    groups.setdefault(key, []).append(row)
  for (panel, kind, blocks, rate), group in groups.items():
    loss = np.mean([row['heldout_nats'] for row in group])
    gaps = [row['gap_nats'] for row in group if row['gap_nats'] is not None]
    forward, backward = (
      claims.number(statistics.geometric_mean([row[name] for row in group]))
      for name in ('gain_fwd_max', 'gain_bwd_max')
    )
    spikes = ' / '.join(str(row['grad_spikes']) for row in group)
    lines.append(
      f'{panel:<8} {kind:<10} {blocks:>6} {rate:>7g} {loss:>9.4f} '
      f'{_fixed(np.mean(gaps) if gaps else None, 4, sign=True):>8} '
      f'{forward:>9} {backward:>9} {spikes:>12}'
    )
  return '\n'.join(lines)


def _introduction(comparison, panels, unfinished) -> list[html.Block]:
  first = next(run for runs in panels.values() for run in runs)
  corpus, model = first.summary['corpus'], first.config.model
  data = first.config.data
  parts: list[html.Block] = [
    html.Heading(1, TITLE),
    'The same transformer, data order and initial weights; only the residual '
    'connection differs: **residual** (one stream), **HC** (Hyper-Connections, '
    'unconstrained mixing of n streams), **mHC** (mixing projected onto the '
    'doubly stochastic matrices) and **identity** (mHC without mixing).',
    f'Model: width {model.dim}, {model.attention.num_heads} heads of latent '
    f'attention, {_ffn(model)}, n = {model.connection.num_streams} '
    f'streams; a block is two sub-layers. Rows of {data.seq_len} byte tokens. '
    f'Optimiser: AdamW, {first.config.optimizer.schedule} schedule.',
    f'Text: {corpus["name"]}, {corpus["num_bytes"] / 1e6:.1f} MB in '
    f'{corpus["num_documents"]} documents, of which '
    f'{corpus["num_heldout_documents"]} are held out whole; sha256 '
    f'{corpus["sha256"][:16]}. Held-out loss is over '
    f'{first.summary["heldout_rows"] * data.seq_len:,} tokens. Device: '
    f'{first.summary["num_devices"]} x {first.summary["device"]}, jax '
    f'{first.summary["jax"]}.',
  ]
  if unfinished:
    parts.append(
      f'**{unfinished} runs of this comparison have not finished** and are '
      'missing below.'
    )
  return parts


def _ffn(model) -> str:
  moe = model.moe
  if not moe.num_experts:
    return f'FFN {model.ffn_dim}'
  return (
    f'{moe.experts_per_token} of {moe.num_experts} experts and '
    f'{moe.num_shared} shared of width {moe.expert_dim} '
    f'({moe.num_dense_blocks} dense block in front, {model.ffn_dim})'
  )


def _panel(workdir, name, title, runs, rows) -> list[html.Block]:
  parts: list[html.Block] = [html.Heading(2, title)]
  for setting in dict.fromkeys(run.comparison_key for run in runs):
    blocks, rate = setting
    here = [run for run in runs if run.comparison_key == setting]
    config = here[0].config
    clip = config.optimizer.clip_norm
    seeds = dict.fromkeys(str(run.config.seed) for run in here)
    parts.append(
      f'{blocks} blocks ({2 * blocks} sub-layers), learning rate {rate:g}, '
      f'{config.num_steps} steps of {config.tokens_per_step} tokens '
      f'({here[0].summary["epochs"]:.2g} epochs), '
      f'{f"gradients clipped at {clip:g}" if clip else "no clipping"}, '
      f'seeds {", ".join(seeds)}.'
    )
    selected = [r for r in rows if (r['blocks'], r['lr']) == setting]
    parts.append(_table(selected))
    judged = contrasts.judge([*contrasts.of_kinds(selected)])
    claimed = claims.evaluate(selected, judged)
    if claimed:
      header = ['Claim', 'Paper', 'Here', 'Verdict']
      parts.append(html.Table(header, [[*c] for c in claimed], numeric=False))
    folder = pathlib.Path('figures') / f'{name}-b{blocks}-lr{rate:g}'
    for file, caption in plots.draw_all(here, workdir / folder).items():
      parts.append(html.Figure(str(folder / file), caption))
  return parts


def _table(rows) -> html.Table:
  """One row per kind: means over seeds, or a value a seed."""
  lines = []
  for kind in dict.fromkeys(row['variant'] for row in rows):
    group = [row for row in rows if row['variant'] == kind]

    def column(name, reduce=np.mean, group=group):
      values = [row[name] for row in group if row[name] is not None]
      return float(reduce(values)) if values else None

    def by_seed(name, group=group):
      return ' / '.join(claims.number(row[name]) for row in group)

    heldout = [row['heldout_nats'] for row in group]
    lines.append(
      [
        plots.LABELS[kind],
        _fixed(column('train_nats_last_25'), 3),
        f'{np.mean(heldout):.4f}'
        + (
          f' ({min(heldout):.3f}-{max(heldout):.3f})' if len(group) > 1 else ''
        ),
        _fixed(column('bits_per_byte'), 3),
        _fixed(column('gap_nats'), 4, sign=True),
        _fixed(column('stream_cosine', np.median), 4),
        by_seed('gain_fwd_max'),
        by_seed('gain_bwd_max'),
        claims.number(column('grad_norm_mean')),
        by_seed('grad_norm_cv'),
        by_seed('grad_norm_max'),
        ' / '.join(str(row['grad_spikes']) for row in group),
        ' / '.join(str(row['loss_spikes']) for row in group),
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


def _notes() -> list[html.Block]:
  return [
    html.Heading(2, 'How to read this'),
    'Losses are means over seeds, with the range of the held-out loss in '
    'parentheses; `gap` is to the plain residual of the same seed. Gains are '
    'the Amax gain magnitudes of the mHC paper (Sec. 3.1): the largest '
    'absolute row sum (forward) or column sum (backward) of the product of '
    'all H_res, averaged over the tokens of the probe, maximum over depth and '
    'probes, seed by seed. The cosine is of pairs of streams where a sub-layer '
    'reads, median over depth and seeds at the end: near 1 the n streams are '
    'one, and nothing can be said of mixing them. The gradient norm is taken '
    'before clipping, over the steps after warm-up: its mean, and by seed its '
    'coefficient of variation over these steps and its maximum; a spike is a '
    f'step above {results.GRAD_SPIKE_FACTOR:g} times the median of the '
    f'{results.WINDOW} steps before it, a loss spike one more than '
    f'{results.LOSS_SPIKE_NATS:g} nat above that median; spikes are counted '
    'seed by seed. Step time (median), memory (XLA: arguments, temporaries '
    'and outputs of one update) and parameters are ratios to the residual. '
    'Step times come from runs one after the other on a machine that may be '
    'busy.',
    'These models are small and the text is one corpus: read the figures as '
    'phenomena, not as rankings. Numbers of every run: `results.json`; of '
    'every step: `metrics.jsonl` in the folders of the runs.',
  ]


def _fixed(value, digits, sign=False):
  return '' if value is None else f'{value:{"+" if sign else ""}.{digits}f}'
