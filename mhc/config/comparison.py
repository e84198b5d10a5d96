"""A comparison: a base run and the panels of runs that vary it.

A panel trains every design at every setting of its axes with every seed. A
design is a kind of connection, a control of `CONTROLS`, or a name of its own
for some settings (`Panel.designs`). An axis is any setting of `Config` by its
dotted name, or `ladder`, the rungs of `presets.ladder`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import re
import types
from typing import Any, Literal, NamedTuple

from mhc import config as config_lib
from mhc.config import checks, dicts, presets

# Plain residuals matched to the panel's `partner`: in total parameters (a wider
# FFN), in memory (wider streams), in time (more steps), and the residual again
# with its sums in another order.
CONTROLS = (
  'residual_params',
  'residual_memory',
  'residual_time',
  'residual_replicate',
)
# Declared where a panel that reports names none and trains both.
CONTRASTS = (
  ('mhc', 'residual'),
  ('mhc', 'identity'),
  ('mhc', 'hc'),
)
LADDER, CONNECTION = 'ladder', 'model.connection.'
# Folders beside the panels' own.
RESERVED = 'timing', 'leases', 'figures'
Setting = tuple[tuple[str, Any], ...]  # (axis, value), in the panel's order
_SHORT = {'model.num_blocks': 'b', 'optimizer.learning_rate': 'lr'}


@dataclasses.dataclass(frozen=True)
class Panel:
  """A group of runs that are drawn together."""

  title: str = ''
  kinds: tuple[str, ...] = ('residual', 'hc', 'mhc')
  seeds: tuple[int, ...] = (0, 1, 2, 3)
  # Two axes under shorter names; () for the base's value.
  num_blocks: tuple[int, ...] = (4,)
  learning_rates: tuple[float, ...] = (3e-3,)
  # More axes, ((setting, values), ...) or a dict. An axis of the connection
  # does not vary the plain residual, nor one that a design fixes that design.
  axes: Setting = ()
  # Designs of its own, ((name, ((setting, value), ...)), ...) or dicts.
  designs: Setting = ()
  # Settings of all its runs, ((setting, value), ...) or a dict.
  settings: Setting = ()
  num_steps: int = 400
  # In place of num_steps: tokens for each active parameter of the residual.
  tokens_per_param: float = 0.0
  batch_size: int = 8
  clip_norm: float = 1.0
  # The router of the mixture of experts; '' is the base's.
  router: Literal['', 'bias', 'sinkhorn', 'none'] = ''
  # 'report' has verdicts on its contrasts; 'explore' has estimates with
  # intervals and no verdicts; 'tune' chooses each design's learning rate.
  role: Literal['report', 'explore', 'tune'] = 'report'
  # (design, other), declared before training; () for those of CONTRASTS.
  contrasts: tuple[Any, ...] = ()
  # Differences within it are equivalent, in nats a token.
  margin: float = 0.01
  # The panel that has chosen the rates, '' for learning_rates.
  tuned_on: str = ''
  # What the controls are matched to.
  partner: str = 'mhc'
  # The seeds that were declared before training, kept by `run_all`; more may be
  # added, and the report says so.
  declared_seeds: tuple[int, ...] = ()
  # Standard deviations over seeds that the differences are expected to have,
  # (((design, other), nats), ...), from a panel of noise: `--list` tells what
  # can be resolved.
  expected_sd: tuple[Any, ...] = ()
  # Panels of one name are the sizes of one fit over compute; '' for none.
  curve: str = ''

  def __post_init__(self):
    for name in ('axes', 'designs', 'settings', 'contrasts', 'expected_sd'):
      object.__setattr__(self, name, _pairs(name, getattr(self, name)))
    for name in ('axes', 'designs', 'settings'):
      _check_named(name, getattr(self, name))
    for design, own in self.designs:
      _check_named(f'designs.{design}', own)
    for entry in self.expected_sd:
      if not (isinstance(entry, tuple) and len(entry) == 2) or not isinstance(
        entry[1], int | float
      ):
        raise ValueError(
          f'panel.expected_sd: {entry!r} must be ((design, other), nats)'
        )
    checks.check_types(self)
    for name in ('kinds', 'seeds', 'num_blocks', 'learning_rates'):
      values = getattr(self, name)
      optional = name in ('num_blocks', 'learning_rates')
      if not (values or optional) or len(set(values)) != len(values):
        raise ValueError(
          f'panel.{name}={values} must list at least one value, none twice'
        )
    for axis, values in self.axes:
      if not isinstance(values, tuple) or not values:
        raise ValueError(
          f'panel.axes: {axis}={values!r} must be a tuple of values'
        )
    own = tuple(name for name, _ in self.designs)
    known = (*config_lib.KINDS, *CONTROLS, *own)
    for kind in self.kinds:
      if ':' in kind:
        raise ValueError(
          f'panel.kinds: {kind!r} is no name of a folder: name it by '
          f"panel.designs, {{'mine': {{'model.connection.kind': {kind!r}}}}}"
        )
      checks.one_of('panel.kinds', kind, known)
    checks.one_of('panel.partner', self.partner, known)
    if self.margin <= 0:
      raise ValueError(f'panel.margin={self.margin} must be positive')
    self._check_contrasts()

  def _check_contrasts(self):
    for pair in self.contrasts:
      if not isinstance(pair, tuple) or len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(f'panel.contrasts: {pair!r} must be two designs')
      for design in pair:
        if design not in self.kinds:
          raise ValueError(
            f'panel.contrasts: {pair!r} names {design!r}, which the panel does '
            f'not train: add it to panel.kinds={self.kinds}'
          )
    if self.declared and len(self.seeds) < 2:
      raise ValueError(
        f'panel.seeds={self.seeds}: a contrast needs two seeds at least, and '
        "four for a verdict; add seeds, or set the panel's role='explore'"
      )

  @property
  def declared(self) -> tuple[tuple[str, str], ...]:
    """The contrasts that get verdicts."""
    if self.role != 'report':
      return ()
    return self.contrasts or self.described

  @property
  def described(self) -> tuple[tuple[str, str], ...]:
    """The contrasts that are estimated."""
    known = [pair for pair in CONTRASTS if {*pair} <= {*self.kinds}]
    if self.partner in self.kinds:
      controls = [kind for kind in self.kinds if kind in CONTROLS]
      known += [(self.partner, kind) for kind in controls]
    others = [
      (kind, 'residual')
      for kind in self.kinds
      if 'residual' in self.kinds
      and kind not in ('residual', 'mhc', *CONTROLS)
      and self.role != 'report'
    ]
    return self.contrasts or (*known, *others)

  @property
  def all_axes(self) -> Setting:
    rates = () if self.tuned_on else self.learning_rates
    axes = (
      ('model.num_blocks', self.num_blocks),
      ('optimizer.learning_rate', rates),
      *self.axes,
    )
    return tuple((axis, values) for axis, values in axes if values)


class Cell(NamedTuple):
  """One run of a comparison, before its controls are matched."""

  name: str  # its folder: PANEL/DESIGN-AXIS=VALUE...-sSEED
  panel: str
  design: str
  setting: Setting  # what varies it
  seed: int
  config: config_lib.Config


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A base run and the panels that vary it."""

  base: config_lib.Config = dataclasses.field(default_factory=config_lib.Config)
  panels: Mapping[str, Panel] = dataclasses.field(
    default_factory=lambda: types.MappingProxyType({'main': Panel()})
  )

  # Step times over the residual's as planned for a pod, ((design, where,
  # ratio), ...): compute multipliers in time are given for them as well.
  planned_overhead: tuple[Any, ...] = ()

  def __post_init__(self):
    planned = _pairs('planned_overhead', self.planned_overhead)
    object.__setattr__(self, 'planned_overhead', planned)
    for entry in planned:
      if not isinstance(entry, tuple) or len(entry) != 3:
        raise ValueError(
          f'planned_overhead: {entry!r} must be (design, where, ratio)'
        )
    if not self.panels:
      raise ValueError('a comparison needs at least one panel')
    for name, panel in self.panels.items():
      checks.is_name('panels', name)
      if name in RESERVED:
        raise ValueError(
          f'panels: {name!r} is a folder of the comparison: name it otherwise'
        )
      for cell in self.cells(name):
        checks.is_name(f'panels.{name}', cell.name.partition('/')[2])
      if panel.tuned_on:
        self._check_tuning(name, panel)

  def _check_tuning(self, name, panel):
    tune = self.panels.get(panel.tuned_on)
    if tune is None or tune.role != 'tune' or tune is panel:
      raise ValueError(
        f'panels.{name}.tuned_on={panel.tuned_on!r} is no other panel with '
        "role='tune'"
      )
    both = {*tune.seeds} & {*panel.seeds}
    if both:
      raise ValueError(
        f'panels.{name}.seeds and those of {panel.tuned_on!r} share '
        f'{sorted(both)}: rates are chosen on other seeds than those reported'
      )
    for kind in panel.kinds:
      if rate_of(kind) not in tune.kinds:
        raise ValueError(
          f'panels.{name}.kinds: {panel.tuned_on!r} tunes no rate for {kind!r}'
        )

  @property
  def ordered(self) -> tuple[str, ...]:
    """The panels: those that tune, that report, that explore."""
    roles = ('tune', 'report', 'explore')
    return tuple(
      sorted(self.panels, key=lambda n: roles.index(self.panels[n].role))
    )

  def check_panels(self, names: Sequence[str] | None):
    """Raises ValueError if there is no panel of one of these names."""
    for name in names or ():
      checks.one_of('--panels', name, tuple(self.panels))

  def cells(self, panel: str) -> list[Cell]:
    """The runs of a panel, designs innermost, each once.

    Raises:
      ValueError: an axis or a design sets what does not exist.
    """
    return _cells(self.base, panel, self.panels[panel])

  def partners(self, panel: str) -> list[Cell]:
    """The runs of a panel's partner, whether they are trained there or not."""
    p = self.panels[panel]
    alone = dataclasses.replace(
      p, kinds=(p.partner,), contrasts=(), role='explore'
    )
    return _cells(self.base, panel, alone)

  def settings(self, panel: str) -> Iterator[Setting]:
    """Every setting of a panel's axes, whole."""
    return _settings(self.panels[panel])


def read(values: Mapping[str, Any]) -> Comparison:
  """A comparison from its file; one from before roles had declared nothing."""
  panels = {
    name: {'role': 'explore', **panel}
    for name, panel in values['panels'].items()
  }
  return dicts.from_dict(Comparison, {**values, 'panels': panels})


def rate_of(design: str) -> str:
  """The design whose tuned learning rate a design takes."""
  return 'residual' if design in CONTROLS else design


def stands_for(own: Setting, setting: Setting) -> bool:
  """Whether a run, varied by `own`, is its design's at a whole setting."""
  return {*own} <= {*setting}


def rows_at(rows: Iterable[dict], setting: Setting) -> list[dict]:
  """The rows of results.json whose runs stand for a whole setting."""
  return [
    row for row in rows if stands_for(tuple(row['setting'].items()), setting)
  ]


def _settings(panel) -> Iterator[Setting]:
  axes = panel.all_axes
  for values in itertools.product(*(values for _, values in axes)):
    yield tuple((a, v) for (a, _), v in zip(axes, values, strict=True))


def _cells(base, name, panel) -> list[Cell]:
  found = {}
  for whole in _settings(panel):
    for seed in panel.seeds:
      for design in panel.kinds:
        setting = tuple(one for one in whole if _varies(panel, design, one[0]))
        words = _words(setting, panel.all_axes)
        folder = f'{name}/{"-".join([design, *words, f"s{seed}"])}'
        if folder not in found:
          config = _config(base, panel, design, setting, seed)
          found[folder] = Cell(folder, name, design, setting, seed, config)
        elif found[folder].setting != setting:
          raise ValueError(f'panels.{name}: two runs would be named {folder}')
  return list(found.values())


def _config(base, panel, design, setting, seed) -> config_lib.Config:
  config, setting = base, dict(setting)
  shared = dict(panel.settings)
  if _kind(panel, design) == 'residual':
    # What a connection could be has no meaning for the plain residual.
    shared = {k: v for k, v in shared.items() if not k.startswith(CONNECTION)}
    config = dataclasses.replace(config, model=config.model.plain)
  if LADDER in setting:
    rung = presets.ladder(setting.pop(LADDER))
    model = dataclasses.replace(rung.model, connection=config.model.connection)
    rate = dataclasses.replace(
      config.optimizer, learning_rate=rung.optimizer.learning_rate
    )
    config = dataclasses.replace(config, model=model, optimizer=rate)
  return dicts.override(
    config,
    {
      'num_steps': panel.num_steps,
      'data.batch_size': panel.batch_size,
      'optimizer.clip_norm': panel.clip_norm,
      'model.moe.router': panel.router or config.model.moe.router,
      'model.connection.kind': _kind(panel, design),
      **shared,
      **{k: v for k, v in setting.items() if not _ignored(panel, design, k)},
      'seed': seed,
      **dict(_own(panel, design)),
    },
  )


def _ignored(panel, design, axis) -> bool:
  """Whether an axis reaches a design only through its partner."""
  return _kind(panel, design) == 'residual' and axis.startswith(CONNECTION)


def _pairs(name, values):
  """Tuples all the way down, from dicts, lists (of JSON) or tuples."""
  if isinstance(values, Mapping):
    values = tuple(values.items())
  if isinstance(values, list | tuple):
    return tuple(
      _pairs(name, v) if isinstance(v, list | tuple | Mapping) else v
      for v in values
    )
  raise ValueError(f'panel.{name}={values!r} must be a dict or a tuple')


def _check_named(name, values):
  """Checks that `values` are pairs of a name and something, none twice."""
  if not isinstance(values, tuple):
    raise ValueError(f'panel.{name}={values!r} must be settings by name')
  for entry in values:
    is_pair = isinstance(entry, tuple) and len(entry) == 2
    if not is_pair or not isinstance(entry[0], str):
      raise ValueError(f'panel.{name}: {entry!r} must be a name and a value')
  names = [entry[0] for entry in values]
  if len({*names}) != len(names):
    raise ValueError(f'panel.{name}: {names} must name nothing twice')


def _own(panel, design) -> Setting:
  return dict(panel.designs).get(design, ())


def _kind(panel, design) -> str:
  own = dict(_own(panel, design)).get('model.connection.kind')
  if own is not None:
    return own
  if design in CONTROLS:
    return 'residual'
  if design in config_lib.KINDS:
    return design
  raise ValueError(f'panel.designs: {design!r} must set model.connection.kind')


def _varies(panel, design, axis) -> bool:
  if axis in dict(_own(panel, design)):
    return False
  matched = design in CONTROLS and design != 'residual_replicate'
  return matched or not _ignored(panel, design, axis)


def _words(setting, axes) -> list[str]:
  """The name's parts, an axis by the end of its name if that tells it."""
  ends = [axis.rpartition('.')[2] for axis, _ in axes]
  words = []
  for axis, value in setting:
    end = axis.rpartition('.')[2]
    text = str(value)
    if isinstance(value, float) and float(f'{value:g}') == value:
      text = f'{value:g}'
    text = re.sub(r'[^\w.+-]', '_', text)
    if axis in _SHORT:
      words.append(f'{_SHORT[axis]}{text}')
    else:
      words.append(f'{end if ends.count(end) == 1 else axis}={text}')
  return words
