"""What a comparison would take and could see, before it is trained.

Seconds are those of two steps of the first panel, the plain residual's and its
partner's, scaled by what others compute: FLOPs outside of the connections at
the first one's rate, work on the streams at the rate of the difference. On a
GPU or TPU small models take less than in proportion; a machine that is busy
with something else takes longer.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mhc import config as config_lib
from mhc.config import dicts
from mhc.experiments import jobs as jobs_lib
from mhc.experiments import statistics
from mhc.experiments import timing
from mhc.parallel import counts
from mhc.training import workdir as workdir_lib

# Step time beyond the residual's, relative to mHC's, on two CPU cores at C = 64
# (timings of docs/results/compare.json).
STREAM_WORK = {'residual': 0.0, 'hc': 0.7, 'identity': 0.46}
# Seconds of a run beside its steps: data, first and last checkpoint, files.
RUN_S = 3.0
# Seconds beside all runs: starting workers, step times in turn, the report.
COMPARISON_S = 45.0
# An evaluation and a probe have no backward pass.
FORWARD = 0.4
# Beside the timings of panels; no panel has a dot in its name.
CALIBRATION = '.plan'


class Line(NamedTuple):
  """The cost of a panel."""

  panel: str
  runs: int
  done: int
  programs: int
  steps: int  # of the runs to do
  seconds: float


class Speed(NamedTuple):
  """Seconds per FLOP of the model and per unit of stream work; compiling."""

  model: float
  streams: float
  compile_s: float


def calibrate(jobs: jobs_lib.Jobs) -> Speed:
  """Times two short programs, once a folder."""
  panel = jobs.panels[0]
  plain = jobs.comparison.cells(panel)[0].config
  pair = {
    kind: dicts.override(plain, {'model.connection.kind': kind})
    for kind in ('residual', 'mhc')
  }
  found = timing.read(jobs.workdir, CALIBRATION)
  if found is None:
    timing.write(jobs.workdir, CALIBRATION, pair)
    found = timing.read(jobs.workdir, CALIBRATION)
  work = {kind: _work(config) for kind, config in pair.items()}
  model = found['residual']['step_s'] / work['residual'][0]
  extra = found['mhc']['step_s'] - model * work['mhc'][0]
  return Speed(
    model,
    max(0.0, extra) / work['mhc'][1],
    (found['residual']['compile_s'] + found['mhc']['compile_s']) / 2,
  )


def predict(jobs: jobs_lib.Jobs, speed: Speed) -> list[Line]:
  """The cost of each panel on one worker; finished runs cost nothing."""
  lines = []
  for panel in jobs.panels:
    cells = jobs.cells(panel) or jobs.comparison.cells(panel)
    todo = [
      c
      for c in cells
      if workdir_lib.read_summary(jobs.workdir / c.name) is None
    ]
    programs = {jobs_lib.program(c.config) for c in todo}
    seconds = sum(run_seconds(c.config, speed) for c in todo)
    lines.append(
      Line(
        panel,
        len(cells),
        len(cells) - len(todo),
        len(programs),
        sum(c.config.num_steps for c in todo),
        seconds + speed.compile_s * len(programs),
      )
    )
  return lines


def run_seconds(config: config_lib.Config, speed: Speed) -> float:
  """Seconds of a run whose program is compiled."""
  model, streams = _work(config)
  step = speed.model * model + speed.streams * streams
  rows = config.final_sequences or 8192
  if config.eval_every:
    rows += config.eval_sequences * (config.num_steps // config.eval_every)
  if config.probe_every:
    rows += (
      2 * config.probe_sequences * (config.num_steps // config.probe_every)
    )
  evaluating = FORWARD * step * rows / config.data.batch_size
  return RUN_S + config.num_steps * step + evaluating


def resolution(jobs: jobs_lib.Jobs) -> list[tuple[str, str, int, float, float]]:
  """(panel, contrast, seeds, expected SD, what it can see) of the declared."""
  panels = {name: jobs.comparison.panels[name] for name in jobs.panels}
  number = sum(
    len(panel.declared) * len([*jobs.comparison.settings(name)])
    for name, panel in panels.items()
  )
  found = []
  for name, panel in panels.items():
    expected = dict(panel.expected_sd)
    for pair in panel.declared:
      if pair in expected and len(panel.seeds) > 1:
        sd = expected[pair]
        seen = statistics.mde(sd, len(panel.seeds), number)
        found.append((name, ' - '.join(pair), len(panel.seeds), sd, seen))
  return found


def describe(
  jobs: jobs_lib.Jobs, lines: Sequence[Line], num_workers: int
) -> str:
  """The plan for people: runs, minutes and resolution."""
  text = [
    f'{"panel":<14}{"runs":>6}{"done":>6}{"programs":>10}{"steps":>9}'
    f'{"minutes":>9}'
  ]
  for line in lines:
    text.append(
      f'{line.panel:<14}{line.runs:>6}{line.done:>6}{line.programs:>10}'
      f'{line.steps:>9,}{line.seconds / 60 / num_workers:>9.1f}'
    )
  total = sum(line.seconds for line in lines) / 60 / num_workers
  if any(line.runs > line.done for line in lines):
    total += COMPARISON_S / 60
  text.append(
    f'\npredicted: {total:.1f} minutes on {num_workers} '
    f'worker{"s" * (num_workers > 1)}, by two steps timed here'
  )
  for panel, pair, seeds, sd, seen in resolution(jobs):
    text.append(
      f'{panel}: {pair} with {seeds} seeds and a spread of {sd:g} nats as '
      f'expected: differences of {seen:.4f} are seen in 4 of 5 comparisons'
    )
  return '\n'.join(text)


def _work(config) -> tuple[float, float]:
  """FLOPs a step outside of the streams, and work on the streams."""
  connection = config.model.connection
  tokens = config.tokens_per_step
  counted = counts.count(config.model.plain, config.data.seq_len)
  model = float(tokens * counted['flops_per_token'])
  if connection.kind == 'residual':
    return model, 0.0
  n = connection.num_streams
  each = config.model.dim * (n * n + 2 * n) + connection.sinkhorn_iters * n * n
  share = STREAM_WORK.get(connection.kind, 1.0)
  return model, share * each * config.model.num_blocks * tokens
