"""A comparison: a base run and the panels of runs that vary it."""

from collections.abc import Mapping, Sequence
import dataclasses
import types
from typing import Literal

from mhc import config as config_lib
from mhc.config import checks, dicts


@dataclasses.dataclass(frozen=True)
class Panel:
  """A group of runs that are drawn together: every kind at every setting."""

  title: str = ''
  kinds: tuple[str, ...] = ('residual', 'hc', 'mhc')
  seeds: tuple[int, ...] = (0,)
  num_blocks: tuple[int, ...] = (4,)
  learning_rates: tuple[float, ...] = (3e-3,)
  num_steps: int = 400
  batch_size: int = 8
  clip_norm: float = 1.0
  # The router of the mixture of experts; '' is the base's.
  router: Literal['', 'bias', 'sinkhorn', 'none'] = ''

  def __post_init__(self):
    checks.check_types(self)
    for name in ('kinds', 'seeds', 'num_blocks', 'learning_rates'):
      values = getattr(self, name)
      if not values or len(set(values)) != len(values):
        raise ValueError(
          f'panel.{name}={values} must list at least one value, none twice'
        )
    for kind in self.kinds:
      checks.one_of('panel.kinds', kind, config_lib.KINDS)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A base run and the panels that vary it."""

  base: config_lib.Config = dataclasses.field(default_factory=config_lib.Config)
  panels: Mapping[str, Panel] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({'main': Panel()})
  )

  def __post_init__(self):
    if not self.panels:
      raise ValueError('a comparison needs at least one panel')
    for panel in self.panels:
      self.runs(panel)

  def only(self, panels: Sequence[str] | None) -> 'Comparison':
    """The comparison of some of the panels; None for all.

    Raises:
      ValueError: there is no such panel.
    """
    for name in panels or ():
      checks.one_of('--panels', name, tuple(self.panels))
    kept = {
      name: panel
      for name, panel in self.panels.items()
      if panels is None or name in panels
    }
    return dataclasses.replace(self, panels=types.MappingProxyType(kept))

  def runs(self, panel: str) -> dict[str, config_lib.Config]:
    """Maps run names to configs, kinds innermost."""
    p = self.panels[panel]
    return {
      f'{panel}/{kind}-b{blocks}-lr{rate:g}-s{seed}': dicts.replace(
        self.base,
        seed=seed,
        num_steps=p.num_steps,
        model=dict(
          num_blocks=blocks,
          connection=dict(kind=kind),
          moe=dict(router=p.router or self.base.model.moe.router),
        ),
        optimizer=dict(learning_rate=rate, clip_norm=p.clip_norm),
        data=dict(batch_size=p.batch_size),
      )
      for blocks in p.num_blocks
      for rate in p.learning_rates
      for seed in p.seeds
      for kind in p.kinds
    }
