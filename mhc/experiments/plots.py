"""The report's figures, each a function of the finished runs of one setting.

Lines are means over seeds (geometric for gains), bands run from the lowest seed
to the highest.
"""

from collections.abc import Callable

from matplotlib import colors
from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from mhc.experiments import events as events_lib
from mhc.experiments import figure_style as looks
from mhc.experiments import results
from mhc.runtime import paths

# Line styles of guards; dashes lie on solid lines where two alert at one step.
MARKS = {
  'nonfinite': ('black', ':'),
  'loss_spike': ('black', '--'),
  'gain': ('#CC79A7', '-'),
  'streams': ('#009E73', (0, (4, 4))),
  'sinkhorn': ('#56B4E9', '-.'),
  'skips': ('black', '-.'),
}

MOST_WITH_NUMBERS = 6  # streams; a larger matrix has no room for them

ByKind = dict[str, list[results.Run]]


def draw_all(runs: list[results.Run], folder: paths.Path) -> dict[str, str]:
  """Draws the figures of one setting into `folder`; file name -> caption."""
  by_kind: ByKind = {}
  for run in runs:
    by_kind.setdefault(run.variant, []).append(run)
  figures: dict[str, tuple[Callable[[ByKind], Figure | None], str]] = {
    'loss.png': (
      loss,
      'Training loss, smoothed over 25 steps, and held-out loss against the '
      'plain residual of the same seed (below zero is better).',
    ),
    'grad_norm.png': (
      grad_norm,
      'Global gradient norm before clipping, every step.',
    ),
    'gains_training.png': (
      gains_over_training,
      'Composite Amax gain over training, the largest over depth: what the '
      'stack of residual mappings can do to a signal (forward) and to a '
      'gradient (backward). 1 is neutral.',
    ),
    'gains_depth.png': (
      gains_over_depth,
      'Amax gain over depth at the end of training: each mapping alone (left) '
      'and composed (right), forward from the first sub-layer and backward '
      'from the last.',
    ),
    'expert_load.png': (
      expert_load,
      'Largest expert load over the mean load, mean over layers; 1 is even.',
    ),
    'mappings.png': (
      mappings,
      'H_res averaged over the tokens of one held-out row, of single '
      'sub-layers and composed; first seed. An entry is the weight of stream '
      'j (column) in stream i (row); red is positive, blue negative, on a '
      'separate scale for each map. Right of a map are its row sums '
      '(forward gain), below it its column sums (backward gain).',
    ),
  }
  drawn = {}
  for name, (draw, caption) in figures.items():
    figure = draw(by_kind)
    if figure is not None:
      looks.write(figure, folder / name, dpi=110)
      drawn[name] = caption
  return drawn


def loss(by_kind: ByKind) -> Figure:
  baseline = {r.config.seed: r for r in by_kind.get('residual', [])}
  figure, axes = _axes(1, 2 if baseline else 1)
  for kind, runs in by_kind.items():
    steps, curves = _curves(runs, 'loss/train')
    curves = np.stack([_smooth(curve) for curve in curves])
    _band(axes[0], kind, steps[-curves.shape[1] :], curves)
  late = [
    line.get_ydata()[len(line.get_ydata()) // 10 :] for line in axes[0].lines
  ]
  finite = np.concatenate(late)[np.isfinite(np.concatenate(late))]
  if finite.size:
    low, high = finite.min(), np.percentile(finite, 99.5)
    axes[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
  _label(axes[0], 'training loss', 'step', 'loss (nats / token)')
  if baseline:
    for kind, runs in by_kind.items():
      paired = [run for run in runs if run.config.seed in baseline]
      if kind == 'residual' or not paired:
        continue
      steps, curves = _curves(paired, 'loss/heldout')
      _, base = _curves(
        [baseline[run.config.seed] for run in paired], 'loss/heldout'
      )
      _band(axes[1], kind, steps, curves - base, marker='o', markersize=3)
    axes[1].axhline(0, color=looks.COLORS['residual'], linewidth=1)
    _label(
      axes[1], 'held-out loss, gap to residual', 'step', 'gap (nats / token)'
    )
  return _legend(figure, axes)


def grad_norm(by_kind: ByKind) -> Figure:
  figure, axes = _axes(1, 1, width=9)
  for kind, runs in by_kind.items():
    for number, run in enumerate(runs):
      steps, values = run.series('grad/global_norm')
      axes[0].plot(
        steps,
        values,
        color=looks.look(kind).color,
        linewidth=0.8,
        alpha=0.8,
        label=looks.look(kind).label if number == 0 else None,
      )
  axes[0].set_yscale('log')
  _label(axes[0], 'gradient norm', 'step', 'global L2 norm')
  return _legend(figure, axes)


def gains_over_training(by_kind: ByKind) -> Figure:
  figure, axes = _axes(1, 2, share_y=True)
  for axis, name, title in (
    (axes[0], 'composite_fwd', 'forward'),
    (axes[1], 'composite_bwd', 'backward'),
  ):
    for kind, runs in by_kind.items():
      steps = np.array([probe['step'] for probe in runs[0].probes])
      curves = np.stack([run.probe(name).max(axis=1) for run in runs])
      _band(
        axis,
        kind,
        steps,
        curves,
        stats.gmean,
        **looks.STYLES.get(kind, {}),
      )
    _gain_axis(axis)
    _label(
      axis, f'{title} composite gain', 'step', 'Amax gain, largest over depth'
    )
  return _legend(figure, axes)


def gains_over_depth(by_kind: ByKind) -> Figure:
  figure, axes = _axes(2, 2, height=6.4)
  panels = (
    ('gain_fwd', 'single mapping, forward'),
    ('composite_fwd', 'composed from 1 to l, forward'),
    ('gain_bwd', 'single mapping, backward'),
    ('composite_bwd', 'composed from l to L, backward'),
  )
  for axis, (name, title) in zip(axes, panels, strict=True):
    for kind, runs in by_kind.items():
      curves = np.stack([run.probe(name)[-1] for run in runs])
      depth = np.arange(1, curves.shape[1] + 1)
      _band(
        axis,
        kind,
        depth,
        curves,
        stats.gmean,
        **looks.STYLES.get(kind, {}),
      )
    _gain_axis(axis)
    _label(axis, title, 'sub-layer l', 'Amax gain')
  return _legend(figure, axes)


def expert_load(by_kind: ByKind) -> Figure | None:
  runs = next(iter(by_kind.values()))
  if not runs[0].config.model.moe.num_experts:
    return None
  figure, axes = _axes(1, 1, width=9)
  for kind, runs in by_kind.items():
    steps, curves = _curves(runs, 'moe/load_max_over_mean')
    _band(axes[0], kind, steps, curves, linewidth=1)
  axes[0].axhline(1, color='black', linewidth=0.6, linestyle=':')
  _label(axes[0], 'expert load', 'step', 'largest / mean')
  return _legend(figure, axes)


def loads_of_panels(panels: dict[str, list[results.Run]]) -> Figure:
  """The expert load of each panel's first run, smoothed over 25 steps."""
  figure, axes = _axes(1, 1, width=9)
  for name, runs in panels.items():
    steps, values = runs[0].series('moe/load_max_over_mean')
    smooth = _smooth(values)
    line = axes[0].plot(steps[-len(smooth) :], smooth, label=name)
    axes[0].plot(
      steps, values, color=line[0].get_color(), linewidth=0.5, alpha=0.4
    )
  axes[0].axhline(1, color='black', linewidth=0.6, linestyle=':')
  _label(axes[0], 'expert load', 'step', 'largest / mean, mean over layers')
  return _legend(figure, axes)


def first_events(panels: dict[str, list[results.Run]]) -> Figure | None:
  """Plots loss and first alerts of each panel's run with most loss spikes.

  Spikes that a run rolled back from count, and are drawn, as well.
  """
  spiky = {}
  for name, runs in panels.items():
    candidates = [run for run in runs if run.events and _num_spikes(run)]
    if candidates:
      spiky[name] = max(candidates, key=_num_spikes)
  if not spiky:
    return None
  figure, axes = _axes(len(spiky), 1, width=9, height=2.8 * len(spiky))
  for axis, (name, run) in zip(axes, spiky.items(), strict=True):
    steps, values = run.series('loss/train')
    axis.plot(steps, values, color=looks.look(run.variant).color, linewidth=1.2)
    for guard, event in events_lib.first_alerts(run.events).items():
      color, style = MARKS.get(guard, ('black', ':'))
      axis.axvline(
        event['step'],
        color=color,
        linestyle=style,
        zorder=2 if style == '-' else 3,
        label=f'step {event["step"]}: guard {guard}',
      )
    points = {
      'linestyle': '',
      'color': looks.look(run.variant).color,
      'zorder': 4,
    }
    spikes = events_lib.rolled_back_spikes(run.events)
    if spikes:
      label = f'step {spikes[0][0]}: first of {len(spikes)} rolled back'
      axis.plot(*zip(*spikes, strict=True), marker='x', label=label, **points)
    if run.loss_spikes:
      spike = run.loss_spike_steps[0]
      label = f'step {spike}: loss spike'
      value = values[steps == spike][0]
      axis.plot([spike], [value], marker='o', label=label, **points)
    title = f'{name}: {looks.look(run.variant).label}, seed {run.config.seed}'
    _label(axis, title, 'step', 'loss (nats / token)')
    axis.legend(
      handles=sorted(axis.lines[1:], key=lambda line: line.get_xdata()[0]),
      frameon=False,
      fontsize=9,
      loc='upper left',
      bbox_to_anchor=(1, 1),
    )
  return figure


def _num_spikes(run):
  return run.loss_spikes + len(events_lib.rolled_back_spikes(run.events))


def mappings(by_kind: ByKind) -> Figure | None:
  kinds = [
    name
    for name, runs in by_kind.items()
    if runs[0].kind not in ('residual', 'identity')
  ]
  if not kinds:
    return None
  depth = 2 * by_kind[kinds[0]][0].config.model.num_blocks
  half = depth // 2
  titles = [f'H_{i}' for i in (1, half, depth)]
  titles += [
    f'H_{half} … H_1',
    f'H_{depth} … H_{half + 1}',
    f'H_{depth} … H_1',
  ]
  figure = Figure(figsize=(13.5, 2.45 * len(kinds)), layout='constrained')
  axes = np.atleast_2d(figure.subplots(len(kinds), len(titles)))
  for line, kind in zip(axes, kinds, strict=True):
    run = by_kind[kind][0]
    single = run.probe('mean')[-1][[0, half - 1, depth - 1]]
    products = run.probe('mean_products')[-1]
    for axis, matrix, title in zip(
      line, np.concatenate([single, products]), titles, strict=True
    ):
      _heat_map(axis, matrix, f'{looks.look(kind).label}: {title}')
  return figure


def _heat_map(axis, matrix, title):
  n = len(matrix)
  crowded = n > MOST_WITH_NUMBERS
  finite = np.nan_to_num(matrix, posinf=0, neginf=0)
  limit = max(1.0, float(np.abs(finite).max()))
  norm = colors.SymLogNorm(0.1, vmin=-limit, vmax=limit)
  axis.imshow(finite, cmap='RdBu_r', norm=norm)
  for i in range(0 if crowded else n):
    for j in range(n):
      dark = abs(float(norm(finite[i, j])) - 0.5) > 0.33
      axis.text(
        j,
        i,
        _short(matrix[i, j]),
        ha='center',
        va='center',
        fontsize=7,
        color='white' if dark else 'black',
      )
  axis.set_title(title, fontsize=9)
  axis.set_xticks(range(n), [_short(s) for s in matrix.sum(axis=0)])
  axis.yaxis.tick_right()
  axis.set_yticks(range(n), [_short(s) for s in matrix.sum(axis=1)])
  axis.tick_params(length=0, labelsize=5 if crowded else 7)
  if crowded:
    axis.tick_params(axis='x', labelrotation=90)
  axis.set_xlabel('column sums', fontsize=7)
  axis.set_ylabel('row sums', fontsize=7)
  axis.yaxis.set_label_position('right')


def _short(value: float) -> str:
  """Formats a value in at most about five characters."""
  if abs(value) < 9.995:
    return f'{value:.2f}'
  if abs(value) < 1e4:
    return f'{value:.0f}'
  return f'{value:.0e}'.replace('e+0', 'e').replace('e+', 'e')


def _curves(runs, name):
  """(steps, [runs, steps]) of a metric that all runs recorded alike."""
  pairs = [run.series(name) for run in runs]
  return pairs[0][0], np.stack([values for _, values in pairs])


def _smooth(curve):
  window = min(results.WINDOW, len(curve))  # a run may be shorter
  kernel = np.full(window, 1 / window)
  return np.convolve(curve, kernel, mode='valid')


def _axes(rows, columns, width=10.5, height=3.8, share_y=False):
  figure = Figure(figsize=(width, height), layout='constrained')
  axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
  return figure, axes.reshape(-1)


def _band(axis, kind, steps, curves, mean=np.mean, **style):
  axis.plot(
    steps,
    mean(curves, axis=0),
    color=looks.look(kind).color,
    label=looks.look(kind).label,
    **style,
  )
  if len(curves) > 1:
    axis.fill_between(
      steps,
      curves.min(axis=0),
      curves.max(axis=0),
      color=looks.look(kind).color,
      alpha=0.15,
      linewidth=0,
    )


def _gain_axis(axis):
  axis.set_yscale('log')
  axis.axhline(1, color='black', linewidth=0.6, linestyle=':')
  low, high = axis.get_ylim()
  low, high = min(low, 0.5), max(high, 3)
  axis.set_ylim(low, high)
  axis.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
  # Within a decade, the ticks between powers of ten need their numbers.
  crowded = high > 30 * low
  axis.yaxis.set_minor_formatter(
    ticker.NullFormatter()
    if crowded
    else lambda value, _: f'{value:g}' if f'{value:e}'[0] in '25' else ''
  )


def _legend(figure, axes):
  """One for all axes, below them: nowhere in a panel is free of lines."""
  handles = {
    line.get_label(): line
    for axis in axes
    for line in axis.lines
    if not line.get_label().startswith('_')
  }
  looks.legend(figure, [*handles.values()])
  return figure


def _label(axis, title, x, y):
  axis.set_title(title, fontsize=11)
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.grid(alpha=0.25, linewidth=0.6)
