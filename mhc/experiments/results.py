"""Reads finished runs into series and into the rows of the report's tables.

Definitions, all over the steps after warm-up:

* a gradient spike is a step whose global gradient norm is more than 3 times the
  median of the 25 steps before it;
* a loss spike is a step whose loss is more than 1 nat above that median of the
  loss;
* the gradient norm's mean, maximum and coefficient of variation (standard
  deviation over mean) are over these steps of one run;
* the roughness of the loss is the standard deviation, over these steps, of the
  loss minus the median of the 25 steps before it;
* gains are maxima over depth and over the probes taken during the run, the
  larger one of forward and backward: mHC's forward gain is 1 by construction;
* the cosine of the streams is the median over the sub-layers, at the end of the
  run; the first sub-layer, whose streams are copies, is left out.
"""

import dataclasses
import functools
import io
import math
from typing import NamedTuple

import numpy as np

from mhc import config as config_lib
from mhc import gains
from mhc.config import comparison as comparison_lib
from mhc.config import task as task_lib
from mhc.experiments import declared
from mhc.experiments import events as events_lib
from mhc.runtime import json_lines
from mhc.runtime import paths
from mhc.runtime import retry
from mhc.training import workdir as workdir_lib

WINDOW = 25
GRAD_SPIKE_FACTOR = 3.0
# The share of questions of a level that are right where it is solved.
SOLVED = 0.9
LOSS_SPIKE_NATS = 1.0
# Entries of a summary without which there is no row.
NEEDED = (
  *('heldout_nats', 'heldout_bits_per_byte', 'num_params', 'tokens'),
  *('peak_bytes', 'device', 'jax', 'corpus', 'num_devices'),
)
# Parts of the held-out text, whose rows stand in the order of its documents.
BLOCKS = 32


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run: its settings, summary, metrics, probes and events."""

  config: config_lib.Config
  summary: dict
  metrics: list[dict]
  probes: list[dict]
  events: list[dict] | None = None
  design: str = ''  # '' for its kind
  setting: comparison_lib.Setting = ()
  row_nats: np.ndarray | None = None  # of the held-out rows at the end

  @property
  def variant(self) -> str:
    return self.design or self.kind

  @property
  def kind(self) -> str:
    return self.config.model.connection.kind

  @property
  def blocks(self) -> tuple[float, ...] | None:
    """Nats a token of BLOCKS successive parts of the held-out rows."""
    if self.row_nats is None or len(self.row_nats) < 2 * BLOCKS:
      return None
    parts = np.array_split(self.row_nats.astype(np.float64), BLOCKS)
    targets = self.config.data.targets_per_row
    return tuple(float(p.mean()) / targets for p in parts)

  def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a metric where it was recorded; null becomes inf."""
    pairs = [(m['step'], m[name]) for m in self.metrics if name in m]
    steps, values = zip(*pairs, strict=True)
    return np.array(steps), _array(values)

  def probe(self, name: str) -> np.ndarray:
    """[probes, ...] of a quantity of `gains.profile`."""
    return _array([probe[name] for probe in self.probes])

  @property
  def solved(self) -> dict[str, int | None]:
    """The step at which a level of a task is solved; None if it never is."""
    found: dict[str, int | None] = {}
    for line in self.metrics:
      for name, value in line.items():
        kind, _, level = name.partition('/')
        if kind == task_lib.ACCURACY and found.setdefault(level, None) is None:
          found[level] = line['step'] if value >= SOLVED else None
    return found

  @functools.cached_property
  def grad_spikes(self) -> int:
    _, norm, median = self._against_median('grad/global_norm')
    return int(np.sum(norm > GRAD_SPIKE_FACTOR * median))

  @functools.cached_property
  def loss_spikes(self) -> int:
    return len(self.loss_spike_steps)

  @functools.cached_property
  def loss_spike_steps(self) -> np.ndarray:
    steps, loss, median = self._against_median('loss/train')
    return steps[loss > median + LOSS_SPIKE_NATS]

  @functools.cached_property
  def final_load(self) -> float | None:
    """Largest over mean expert load of the last steps; None without experts."""
    if not self.config.model.moe.num_experts:
      return None
    return float(np.mean(self.series('moe/load_max_over_mean')[1][-WINDOW:]))

  @property
  def flops(self) -> float | None:
    """Training FLOPs as the paper counts; None for a run without the count."""
    each = self.summary.get('flops_per_token')
    return None if each is None else float(each * self.summary['tokens'])

  @functools.cached_property
  def step_seconds(self) -> float:
    return float(np.median(self.series('time/step_s')[1]))

  @functools.cached_property
  def grad_norm(self) -> np.ndarray:
    """The gradient norm after warm-up; of all steps, if none is after."""
    values = self.series('grad/global_norm')[1]
    return values[self._warm :] if len(values) > self._warm else values

  @functools.cached_property
  def roughness(self) -> float | None:
    _, loss, median = self._against_median('loss/train')
    return float(np.std(loss - median)) if len(loss) else None

  @functools.cached_property
  def stream_cosine(self) -> float | None:
    """None for one stream, or for a run from before it was recorded."""
    if self.kind == 'residual' or 'stream_cosine' not in self.probes[-1]:
      return None
    return float(np.median(self.probe('stream_cosine')[-1][1:]))

  @property
  def _warm(self) -> int:
    """The first step, counted from 0, that is judged."""
    return max(WINDOW, self.config.optimizer.warmup_steps)

  def _against_median(self, name):
    steps, values = self.series(name)
    if len(values) <= self._warm:
      return (np.zeros(0),) * 3
    windows = np.lib.stride_tricks.sliding_window_view(values[:-1], WINDOW)
    medians = np.median(windows, axis=1)
    first = self._warm
    return steps[first:], values[first:], medians[first - WINDOW :]


def read(
  folder: paths.Path,
  design: str = '',
  setting: comparison_lib.Setting = (),
) -> Run | None:
  """The run in `folder`, None if it has not finished.

  Raises:
    ValueError: one of its files is damaged.
  """
  summary = workdir_lib.read_summary(folder, NEEDED)
  if summary is None:
    return None
  return Run(
    workdir_lib.read_config(folder),
    summary,
    _lines(folder / workdir_lib.METRICS, 'loss/train'),
    _lines(folder / workdir_lib.PROBES, 'composite_fwd'),
    events_lib.read(folder),
    design,
    setting,
    _heldout(folder / workdir_lib.HELDOUT),
  )


def _lines(file, name) -> list[dict]:
  """The lines of a file, each of which must have `name`."""
  lines = json_lines.read_lines(file)
  if not all(name in line for line in lines):
    raise ValueError(f'{file} is damaged: a line has no {name!r}')
  if not lines:
    what = 'holds no line that can be read' if file.exists() else 'is gone'
    raise ValueError(f'{file} is damaged: it {what}')
  return lines


def _heldout(file) -> np.ndarray | None:
  if not file.exists():
    return None
  data = retry.with_retries(file.read_bytes, file)
  try:
    return np.load(io.BytesIO(data))
  except (ValueError, EOFError) as error:
    raise ValueError(f'{file} is damaged: {error}') from None


class Found(NamedTuple):
  """What a comparison's folder holds."""

  comparison: comparison_lib.Comparison
  panels: dict[str, list[Run]]  # the finished runs of each
  unfinished: int
  damaged: list[str]  # a line for each run that cannot be read


def read_comparison(workdir: paths.Path) -> Found:
  """Reads the runs of a comparison; those that are damaged are left out.

  Raises:
    ValueError: `workdir` holds no comparison.
  """
  comparison = declared.read(workdir)
  if comparison is None:
    raise ValueError(
      f'{workdir} holds no comparison ({workdir / declared.COMPARISON} is '
      'missing): run without --report_only first, or give the --workdir of one'
    )
  found = Found(comparison, {}, 0, [])
  unfinished = 0
  for panel in found.comparison.ordered:
    found.panels[panel] = []
    for cell in found.comparison.cells(panel):
      try:
        run = read(workdir / cell.name, cell.design, cell.setting)
      except (ValueError, OSError) as error:
        found.damaged.append(f'{cell.name}: {error}')
        continue
      if run is None:
        unfinished += 1
      else:
        found.panels[panel].append(run)
  return found._replace(unfinished=unfinished)


def rows(panel: str, runs: list[Run]) -> list[dict]:
  """One row per run; ratios and gaps are to its plain residual counterpart."""
  return [_row(panel, run, _baseline(run, runs)) for run in runs]


def _baseline(run, runs) -> Run | None:
  """The plain residual of a run's seed at its setting."""
  for other in runs:
    if (
      other.variant == 'residual'
      and other.config.seed == run.config.seed
      and comparison_lib.stands_for(other.setting, run.setting)
    ):
      return other
  return None


def _row(panel, run, baseline):
  model, norm = run.config.model, run.grad_norm
  forward, backward = (
    float(run.probe(f'composite_{way}').max()) for way in ('fwd', 'bwd')
  )

  def ratio_to_baseline(value):
    return None if baseline is None else value(run) / value(baseline)

  gap = None
  if baseline is not None:
    losses = (r.summary['heldout_nats'] for r in (run, baseline))
    gap = float(np.subtract(*map(_finite, losses)))
  return {
    'panel': panel,
    'variant': run.variant,
    'kind': run.kind,
    'seed': run.config.seed,
    'setting': dict(run.setting),
    'blocks': model.num_blocks,
    'lr': run.config.optimizer.learning_rate,
    'num_streams': model.connection.streams,
    'sinkhorn_iters': model.connection.sinkhorn_iters,
    'dim': model.dim,
    'steps': run.config.num_steps,
    'tokens': run.summary['tokens'],
    'flops': run.flops,
    'train_nats_last_25': float(np.mean(run.series('loss/train')[1][-WINDOW:])),
    'heldout_nats': _finite(run.summary['heldout_nats']),
    'heldout_blocks': run.blocks,
    'bits_per_byte': run.summary['heldout_bits_per_byte'],
    'solved': run.solved,
    'chance': {
      level: run.config.data.task.chance(int(level)) for level in run.solved
    },
    'gap_nats': gap,
    'gain_fwd_max': forward,
    'gain_bwd_max': backward,
    'gain_max': max(forward, backward),
    'stream_cosine': run.stream_cosine,
    'roughness': run.roughness,
    'grad_norm_mean': float(norm.mean()),
    'grad_norm_cv': float(norm.std() / norm.mean()),
    'grad_norm_max': float(norm.max()),
    'grad_spikes': run.grad_spikes,
    'loss_spikes': run.loss_spikes,
    **events_lib.counts(run.events, run.metrics, run.config),
    'load_max_over_mean': run.final_load,
    'step_time_s': run.step_seconds,
    'step_time_ratio': ratio_to_baseline(lambda r: r.step_seconds),
    'peak_bytes_ratio': ratio_to_baseline(lambda r: r.summary['peak_bytes']),
    'params': run.summary['num_params'],
    'column_residual': _last(run, 'column_residual_mean', np.mean),
    'sigma_diff': _last(run, 'sigma_diff_fwd', lambda depth: depth[-1]),
    'half_life': _last(run, 'sigma_diff_fwd', gains.half_life),
    'streams_read': _last(run, 'streams_read', np.mean),
    'flops_ratio': ratio_to_baseline(lambda r: r.flops or math.nan),
    'params_ratio': ratio_to_baseline(lambda r: r.summary['num_params']),
    **_spent(run.summary.get('goodput')),
    # A run of an earlier version does not know its commit.
    'commit': run.summary.get('commit', ''),
  }


def _spent(goodput) -> dict:
  """Where the time of a run went; None for one of an earlier version."""
  if goodput is None:
    return dict.fromkeys(('goodput', 'wall_s', 'starts', 'lost_steps'))
  return {
    'goodput': goodput['share'],
    'wall_s': goodput['wall_s'],
    'starts': goodput['starts'],
    'lost_steps': sum(goodput['lost_steps'].values()),
  }


def _last(run, name, reduce) -> float | None:
  """A quantity over depth at the end; None if the run has not kept it."""
  if name not in run.probes[-1]:
    return None
  return float(reduce(run.probe(name)[-1]))


def _finite(value: float | None) -> float:
  """A loss; inf for null, which stands for what is not finite."""
  return math.inf if value is None else value


def _array(values) -> np.ndarray:
  """Converts nested lists to floats; null (not a finite number) becomes inf."""
  array = np.array(values, dtype=object)
  array[array == None] = np.inf  # noqa: E711, element by element
  return array.astype(np.float64)
