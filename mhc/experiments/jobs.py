"""What a comparison has to do, as far as it is known: timings and runs.

Some runs depend on others: a panel that is `tuned_on` another takes its rates,
and `residual_time` the steps of its partner's time. Their jobs appear when what
they depend on has been found, in every worker alike, from the files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from mhc import config as config_lib
from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.config.comparison import CONTROLS
from mhc.config.comparison import Cell
from mhc.config.comparison import Comparison
from mhc.experiments import controls
from mhc.experiments import timing
from mhc.experiments import tuning
from mhc.parallel import counts
from mhc.runtime import paths
from mhc.training import workdir as workdir_lib


def program(config: config_lib.Config) -> config_lib.Config:
  """What a run compiles: its config without seeds."""
  return dataclasses.replace(config, seed=0, data_seed=-1)


class Jobs:
  """The jobs of the given panels of a comparison; all of them for None."""

  def __init__(
    self,
    comparison: Comparison,
    workdir: paths.Path,
    panels: Sequence[str] | None = None,
  ):
    self.comparison, self.workdir = comparison, workdir
    self.panels = tuple(
      name for name in comparison.ordered if not panels or name in panels
    )
    for name in self.panels:
      tuned_on = comparison.panels[name].tuned_on
      if tuned_on and tuned_on not in self.panels:
        self.panels = (tuned_on, *self.panels)
    self._rates: dict[str, dict[str, tuning.Choice]] = {}
    self._plain: dict[str, list[Cell]] = {
      name: comparison.cells(name) for name in self.panels
    }
    self._known: dict[str, Cell] = {}

  def names(self) -> list[str]:
    """Jobs that can be done by now.

    Timings come last, when their programs are compiled, but for those that
    `residual_time` waits for.
    """
    timings = [
      f'{timing.TIMING}/{name}' for name in self.panels if self._is_timed(name)
    ]
    needed = {
      f'{timing.TIMING}/{name}'
      for name in self.panels
      if 'residual_time' in self.comparison.panels[name].kinds
    }
    return [
      *(name for name in timings if name in needed),
      *(cell.name for cell in self.cells()),
      *(name for name in timings if name not in needed),
    ]

  def _is_timed(self, panel) -> bool:
    is_reported = self.comparison.panels[panel].role == 'report'
    return is_reported and self.rates(panel) is not None

  def is_complete(self) -> bool:
    """Whether all jobs are known."""
    return all(
      self.rates(name) is not None
      and all(self._is_matched(name, cell) for cell in self._plain[name])
      for name in self.panels
    )

  def is_finished(self) -> bool:
    """Whether all jobs are known and done."""
    return self.is_complete() and all(map(self.is_done, self.names()))

  def is_done(self, name: str) -> bool:
    if name.startswith(f'{timing.TIMING}/'):
      panel = name.partition('/')[2]
      return timing.path(self.workdir, panel).exists()
    return (self.workdir / name / workdir_lib.SUMMARY).exists()

  def program_of(self, name: str) -> Any:
    """What a job compiles: its config without seeds."""
    if name not in self._known:
      return name
    return program(self._known[name].config)

  def cell(self, name: str) -> Cell:
    return self._known[name]

  def cells(self, panel: str | None = None) -> list[Cell]:
    """The runs that are known by now, as they are trained."""
    found = []
    for name in self.panels if panel is None else (panel,):
      if self.rates(name) is None:
        continue
      for cell in self._plain[name]:
        if cell.name not in self._known and self._is_matched(name, cell):
          self._known[cell.name] = self._finished(cell)
        if cell.name in self._known:
          found.append(self._known[cell.name])
    return found

  def first_configs(self, panel: str) -> dict[str, config_lib.Config]:
    """Each design's first run, for `timing`; controls but by their residual."""
    configs = {}
    for cell in self._plain[panel]:
      if cell.design not in CONTROLS and cell.design not in configs:
        configs[cell.design] = self._finished(cell).config
    return configs

  def rates(self, panel: str) -> Mapping[str, tuning.Choice] | None:
    """The tuned rates of a panel, {} where none are; None before they are."""
    tuned_on = self.comparison.panels[panel].tuned_on
    if not tuned_on:
      return {}
    if tuned_on not in self._rates:
      cells = self.cells(tuned_on)
      summaries = [
        workdir_lib.read_summary(self.workdir / cell.name, ('heldout_nats',))
        for cell in cells
      ]
      if None in summaries:
        return None
      rows = [
        {
          'variant': cell.design,
          'lr': cell.config.optimizer.learning_rate,
          'heldout_nats': summary['heldout_nats'],
        }
        for cell, summary in zip(cells, summaries, strict=True)
      ]
      self._rates[tuned_on] = tuning.choose(rows)
    return self._rates[tuned_on]

  def _is_matched(self, panel, cell) -> bool:
    if cell.design != 'residual_time':
      return True
    return timing.read(self.workdir, panel) is not None

  def _finished(self, cell) -> Cell:
    """The run with its rate, its steps and what its control is given."""
    config = self._scheduled(cell, cell.config)
    if cell.design in CONTROLS:
      panel = self.comparison.panels[cell.panel]
      partner = next(
        other
        for other in self.comparison.partners(cell.panel)
        if other.seed == cell.seed
        and (
          comparison_lib.stands_for(cell.setting, other.setting)
          or comparison_lib.stands_for(other.setting, cell.setting)
        )
      )
      ratio = None
      if cell.design == 'residual_time':
        found = timing.read(self.workdir, cell.panel)
        ratio = found[panel.partner]['ratio'][0]
      partner = self._scheduled(partner, partner.config)
      config = controls.match(cell.design, config, partner, ratio)
    return cell._replace(config=config)

  def _scheduled(self, cell, config):
    panel, changes = self.comparison.panels[cell.panel], {}
    if panel.tuned_on:
      choice = self.rates(cell.panel)[comparison_lib.rate_of(cell.design)]
      changes[tuning.RATE] = choice.rate
    if panel.tokens_per_param:
      counted = counts.count(config.model.plain, config.data.seq_len)
      tokens = panel.tokens_per_param * counted['active_params']
      changes['num_steps'] = math.ceil(tokens / config.tokens_per_step)
    return dicts.override(config, changes) if changes else config
