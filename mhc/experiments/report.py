"""The comparison's report: results.json, results.csv, report.md, report.html.

Everything is computed from the runs' files, so a report can be rebuilt at any
time; every number in it follows from results.json.
"""

import csv
import io
import json
import math
from typing import Any

import numpy as np

from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.experiments import claims
from mhc.experiments import contrasts
from mhc.experiments import curves
from mhc.experiments import events
from mhc.experiments import figure_style
from mhc.experiments import html
from mhc.experiments import plots
from mhc.experiments import results
from mhc.experiments import sections
from mhc.experiments import solved
from mhc.experiments import statistics
from mhc.experiments import tables
from mhc.experiments import timing
from mhc.experiments import tuning
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.runtime import source

TITLE = 'Residual designs compared'
SCHEMA = 2
ATTENTION = {'mla': 'latent', 'gqa': 'grouped-query'}


def render(workdir: paths.Path, *, keep: bool = False) -> dict[str, Any]:
  """Writes the report of the comparison in `workdir`.

  Drawing takes most of the time: with `keep`, pages that this commit has drawn
  from the same numbers stay as they are.

  Returns:
    what results.json holds: schema, commit (of this report), trained_at (the
    commits of the runs), comparison, device, jax, rows, contrasts, rates,
    timings, curves and profiles.

  Raises:
    ValueError: `workdir` holds no comparison, or no finished run of it.
  """
  found = results.read_comparison(workdir)
  comparison = found.comparison
  panels = {name: runs for name, runs in found.panels.items() if runs}
  if multihost.is_first():
    for line in found.damaged:
      console.print_line(f'LEFT OUT: {line}')
  if not panels:
    raise ValueError(
      f'{workdir} holds no finished run that can be read: run without '
      '--report_only first'
    )
  rows = [r for name, runs in panels.items() for r in results.rows(name, runs)]
  choices = _choices(comparison, rows)
  judged = contrasts.judge(contrasts.collect(comparison, rows, choices))
  tested = [contrasts.as_dict(j) for j in judged]
  timings = {
    name: read for name in panels if (read := timing.read(workdir, name))
  }
  first = next(iter(panels.values()))[0]
  values = {
    'schema': SCHEMA,
    'commit': source.commit(),
    'comparison': dicts.to_dict(comparison),
    'trained_at': sorted({row['commit'] for row in rows if row['commit']}),
    'device': first.summary['device'],
    'jax': first.summary['jax'],
    'unfinished': found.unfinished,
    'damaged': found.damaged,
    'rows': rows,
    'contrasts': tested,
    'rates': {
      p: {d: c._asdict() for d, c in x.items()} for p, x in choices.items()
    },
    'timings': timings,
    'curves': curves.collect(comparison, rows, timings),
    'profiles': {
      name: sections.profiles(_first_setting(comparison, name, runs))
      for name, runs in panels.items()
    },
  }
  values = files.jsonable(values)
  text = json.dumps(values, indent=1) + '\n'
  if not (keep and _is_drawn(workdir, values['commit'], text)):
    parts = _parts(workdir, comparison, panels, rows, choices, judged, values)
    files.replace(workdir / 'results.csv', _csv(values['rows']), shared=True)
    files.replace(workdir / 'report.md', html.markdown(parts), shared=True)
    page = html.html(TITLE, parts, workdir)
    files.replace(workdir / 'report.html', page, shared=True)
    # Last: it says that the others are there.
    files.replace(workdir / 'results.json', text, shared=True)
  return {**values, 'judged': judged}


def _is_drawn(workdir, commit, text) -> bool:
  if not commit or commit.endswith('-dirty'):
    return False  # the source may have changed, unseen
  written = workdir / 'results.json'
  others = ('report.html', 'report.md', 'results.csv', 'figures')
  return (
    all((workdir / name).exists() for name in others)
    and written.exists()
    and written.read_bytes() == text.encode()
  )


def _parts(workdir, comparison, panels, rows, choices, judged, values):
  """The page, section by section.

  `rows` hold numbers that are not finite, which are null in `values`.
  """
  found = values['contrasts']
  declared = [c for c in found if c['declared']]
  parts = [
    *_introduction(comparison, panels, declared, values),
    *(sections.contrast_table(found) if found else []),
    *sections.forest(workdir, found),
    *sections.tuning(workdir, values['rows'], choices),
    *curves.section(workdir, values['curves']),
  ]
  for name, runs in panels.items():
    parts += tables.panel(workdir, comparison, name, runs, rows, judged)
    parts += solved.section(workdir, name, rows)
    if comparison.panels[name].role != 'tune':
      parts += sections.contraction(workdir, name, values['profiles'][name])
  parts += [
    *sections.ablation(workdir, comparison, found),
    *sections.axes(workdir, comparison, values['rows']),
    *sections.capabilities(),
    *sections.cost(rows, values['timings']),
    *sections.goodput(rows),
    *_loads(workdir, panels),
    *_events(workdir, panels, rows),
    *tables.notes(),
  ]
  return parts


def _choices(comparison, rows):
  """The tuned rates of each tuning panel whose runs have all finished."""
  choices = {}
  for name, panel in comparison.panels.items():
    here = [row for row in rows if row['panel'] == name]
    if panel.role == 'tune' and len(here) == len(comparison.cells(name)):
      choices[name] = tuning.choose(here)
  return choices


def _first_setting(comparison, panel, runs):
  """The runs at the first setting that any has finished at."""
  for setting in comparison.settings(panel):
    here = [r for r in runs if comparison_lib.stands_for(r.setting, setting)]
    if here:
      return here
  return []


def _csv(rows) -> str:
  """The rows as a tidy table: a run a line, settings as JSON."""
  names = [name for name in rows[0] if name != 'heldout_blocks']
  text = io.StringIO()
  writer = csv.DictWriter(text, names, extrasaction='ignore')
  writer.writeheader()
  for row in rows:
    nested = {k: json.dumps(v) for k, v in row.items() if isinstance(v, dict)}
    writer.writerow({**row, **nested})
  return text.getvalue()


def _loads(workdir, panels) -> list[html.Block]:
  """One figure across panels, where more than one has experts."""
  routed = {
    name: runs
    for name, runs in panels.items()
    if runs and runs[0].config.model.moe.num_experts
  }
  if len(routed) < 2:
    return []
  figure, file = plots.loads_of_panels(routed), 'figures/expert_load.png'
  figure_style.write(figure, workdir / file, dpi=110)
  return [
    html.Heading(2, 'Expert load of the panels'),
    html.Figure(
      file,
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
      events.summary_table(rows, figure_style.short),
      numeric=False,
    ),
  ]
  figure = plots.first_events(panels)
  if figure is not None:
    file = 'figures/events.png'
    figure_style.write(figure, workdir / file, dpi=110)
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
        number = len(run.events)
        setting = figure_style.setting_words(dict(run.setting))
        parts.append(
          html.Details(
            f'{name}: {figure_style.short(run.variant)}, {setting}, seed '
            f'{run.config.seed}: {number} event{"s" * (number > 1)}',
            [
              html.Table(
                events.HEADER, events.table_rows(run.events), numeric=False
              )
            ],
          )
        )
  if not any(isinstance(part, html.Details) for part in parts):
    parts.append('No events.')
  return parts


def summary(values: dict[str, Any]) -> str:
  """Formats a line a design and the verdicts, for the terminal."""
  lines = [
    f'{"panel":<10} {"design":<16} {"setting":<24} {"seeds":>5} '
    f'{"held-out":>9} {"gain":>9} {"cosine":>7} {"spiked":>7}'
  ]
  groups: dict[tuple, list[dict]] = {}
  for row in values['rows']:
    key = (
      row['panel'],
      row['variant'],
      figure_style.setting_words(row['setting']),
    )
    groups.setdefault(key, []).append(row)
  for (panel, design, setting), group in groups.items():
    losses = [row['heldout_nats'] for row in group]
    loss = 'not finite' if None in losses else f'{np.mean(losses):.4f}'
    gain = statistics.geometric_mean(
      [row['gain_max'] or math.inf for row in group]
    )
    cosines = [r['stream_cosine'] for r in group if r['stream_cosine']]
    cosine = f'{np.median(cosines):.3f}' if cosines else ''
    spiked = sum(row['loss_spikes'] > 0 for row in group)
    lines.append(
      f'{panel:<10} {design:<16} {setting:<24} {len(group):>5} {loss:>9} '
      f'{claims.number(gain):>9} {cosine:>7} {spiked:>3} of {len(group)}'
    )
  return '\n'.join([*lines, '', *sections.verdict_lines(values['judged'])])


def _introduction(comparison, panels, declared, values) -> list[html.Block]:
  first = next(run for runs in panels.values() for run in runs)
  corpus, model = first.summary['corpus'], first.config.model
  data, n = first.config.data, comparison.base.model.connection.num_streams
  parts: list[html.Block] = [
    html.Heading(1, TITLE),
    'The same transformer, data order and initial weights; only the residual '
    'connection differs: **residual** (one stream), **HC** (Hyper-Connections, '
    'unconstrained mixing of n streams), **mHC** (mixing projected onto the '
    'doubly stochastic matrices), **identity** (mHC without mixing), and '
    'residuals matched to one of them in parameters, memory or time.',
    f'Model: width {model.dim}, {model.attention.num_heads} heads of '
    f'{ATTENTION[model.attention.kind]} attention, '
    f'{tables.ffn(model)}, n = {n} streams; a block is two sub-layers. Rows '
    f'of {data.seq_len} byte tokens. Optimiser: AdamW, '
    f'{first.config.optimizer.schedule} schedule.',
    f'{_text(corpus)} Device: {first.summary["num_devices"]} x '
    f'{first.summary["device"]}, jax {first.summary["jax"]}. Trained at commit '
    f'{", ".join(values["trained_at"]) or "unknown"}, reported at '
    f'{values["commit"] or "unknown"}.',
  ]
  if declared:
    names = dict.fromkeys(
      f'{figure_style.short(c["kind"])} - {figure_style.short(c["other"])}'
      for c in declared
    )
    parts.append(
      f'Declared before training: {", ".join(names)}; {len(declared)} '
      'contrasts with their settings, corrected together (Holm). Everything '
      'else is exploratory: estimates with intervals, no verdicts.'
    )
  parts += _added_seeds(comparison)
  tokens = max(row['tokens'] for row in values['rows'])
  parts.append(
    f'What this size cannot say: models of this width trained on at most '
    f'{tokens / 1e6:.2g} million tokens of one corpus say nothing of losses, '
    'benchmarks or the relative cost at billions of parameters. Phenomena '
    '(gains, contraction, equal streams) can be compared, rankings cannot.'
  )
  if values['unfinished']:
    parts.append(
      f'**{values["unfinished"]} runs of this comparison have not finished** '
      'and are missing below.'
    )
  if values['damaged']:
    parts.append(
      '**Left out below, because a file of theirs cannot be read:** '
      f'{"; ".join(values["damaged"])}.'
    )
  return parts


def _text(corpus) -> str:
  if corpus.get('made'):
    return f'Task: {corpus["name"]}, {corpus["made"]}.'
  return (
    f'Text: {corpus["name"]}, {corpus["num_bytes"] / 1e6:.1f} MB in '
    f'{corpus["num_documents"]} documents, of which '
    f'{corpus["num_heldout_documents"]} are held out whole; sha256 '
    f'{corpus["sha256"][:16]}.'
  )


def _added_seeds(comparison) -> list[html.Block]:
  parts: list[html.Block] = []
  for name, panel in comparison.panels.items():
    added = [s for s in panel.seeds if s not in panel.declared_seeds]
    if panel.declared_seeds and added and panel.declared:
      parts.append(
        f'**Panel {name}: seeds {added} were added after it had begun** with '
        f'{list(panel.declared_seeds)}; its error rates hold only if that was '
        'not decided by the results.'
      )
  return parts
