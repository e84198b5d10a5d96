r"""Watches a run for what comes before a lost one, and says what to do.

    guard       metric             trouble
    nonfinite   loss, gradient     is not a finite number
    loss_spike  loss               z > `spike_score` of the steps before
    gain        gains              composite Amax gain (paper, Eq. 4) above
                                   `gain_bound`, forward or backward
    streams     cosine, growth     mean cosine of the last streams' pairs above
                                   `cosine_bound` having been below (collapse),
                                   or their rms above `growth_bound` times that
                                   of the first (explosion)
    sinkhorn    residual           |row or column sum - 1| of a doubly
                                   stochastic H_res above `sinkhorn_bound`

z is robust: (loss - median) / (1.4826 MAD), over a window of `spike_window`
steps, MAD being the median distance from the median, and at least 0.1 % of it.
The device is told the loss that would be a spike, so that it can refuse the
update at once. The first two are looked at in each step, the others where the
run is probed.

What is said of a step is a function of the metrics up to it alone: a run that
is killed and goes on says the same. An `Event` is made when trouble begins, not
again while it lasts.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from mhc import config as config_lib

# Kinds whose H_res should have the row and column sums of a permutation.
STOCHASTIC = frozenset(config_lib.KINDS) - {'hc', 'orthogonal'}
SEVERITY = ('log', 'skip_step', 'rollback', 'stop')
# The window says nothing before it holds as many losses.
LEAST = 16


class Stop(ValueError):
  """A guard ended the run."""


class Event(NamedTuple):
  """Trouble that began at a step, and the `policy` for it."""

  step: int
  guard: str
  metric: str
  value: float
  bound: float
  policy: str

  def __str__(self) -> str:
    return (
      f'step {self.step}: {self.guard}: {self.metric} is {self.value:.4g} '
      f'(bound {self.bound:.4g}): {self.policy}'
    )


@dataclasses.dataclass
class GuardState:
  """What a guard knows of the steps before; saved with the state."""

  losses: list[float] = dataclasses.field(default_factory=list)
  # Of the next two steps: the next is dispatched before the last is looked at.
  limits: list[float | None] = dataclasses.field(
    default_factory=lambda: [None, None]
  )
  active_alerts: list[str] = dataclasses.field(default_factory=list)
  streams_have_differed: bool = False  # whether the streams have differed
  skipped: int = 0  # updates in a row that were not made
  rollbacks: int = 0
  rate: float = 1.0  # factor on the learning rate

  @classmethod
  def from_saved(cls, state: Mapping[str, Any]) -> 'GuardState':
    """From a checkpoint, with the names of before for one release."""
    old = {'apart': 'streams_have_differed', 'troubled': 'active_alerts'}
    return cls(**{old.get(name, name): value for name, value in state.items()})


class Guards:
  """The guards of one run."""

  def __init__(self, config: config_lib.Config):
    self._config, self._kind = config.guards, config.model.connection.kind
    self.memory = GuardState()

  def state(self) -> dict[str, Any]:
    return dataclasses.asdict(self.memory)

  def restore(self, state: Mapping[str, Any]):
    self.memory = GuardState.from_saved(state)

  def loss_limit(self) -> float:
    """Of the next step: a loss above is a spike. To be asked once a step."""
    limit = self.memory.limits.pop(0)
    return math.inf if limit is None else limit

  def step(
    self, step: int, limit: float, values: Mapping[str, float]
  ) -> list[Event]:
    """What a step's metrics say, that was given `limit`."""
    config, memory = self._config, self.memory
    loss, norm = values['loss/train'], values['grad/global_norm']
    name, value = ('loss', loss)
    if math.isfinite(loss):
      name, value = ('gradient norm', norm)
    found = [
      self._alert_on_rise(
        step, 'nonfinite', name, value, math.inf, not math.isfinite(value)
      ),
      self._alert_on_rise(
        step, 'loss_spike', 'loss above', loss, limit, loss > limit
      ),
    ]
    if math.isfinite(loss):
      memory.losses = [*memory.losses, loss][-config.spike_window :]
    memory.limits = [*memory.limits, self._limit()]
    memory.skipped = (
      memory.skipped + 1 if values.get('optimizer/skipped') else 0
    )
    if memory.skipped > config.max_skips:
      bound = config.max_skips
      found.append(
        Event(step, 'skips', 'updates in a row', bound + 1.0, bound, 'stop')
      )
    return [event for event in found if event]

  def _limit(self) -> float | None:
    """That of the step after next; None while there are too few losses."""
    losses = np.array(self.memory.losses)
    if len(losses) < LEAST:
      return None
    median = float(np.median(losses))
    spread = 1.4826 * float(np.median(np.abs(losses - median)))
    return median + self._config.spike_score * max(spread, 1e-3 * abs(median))

  def probe(self, step: int, seen: Mapping[str, float]) -> list[Event]:
    """What the `measures` of a probe after a step say."""
    config, memory = self._config, self.memory
    gain, cosine, growth = seen['gain'], seen['cosine'], seen['growth']
    found = [
      self._alert_on_rise(
        step,
        'gain',
        'composite gain',
        gain,
        config.gain_bound,
        not gain <= config.gain_bound,
      ),
      self._alert_on_rise(
        step,
        'streams',
        'growth of the streams',
        growth,
        config.growth_bound,
        not growth <= config.growth_bound,
      ),
    ]
    if self._kind != 'residual':
      found.append(
        self._alert_on_rise(
          step,
          'streams',
          'cosine of the streams',
          cosine,
          config.cosine_bound,
          memory.streams_have_differed and cosine > config.cosine_bound,
        )
      )
      memory.streams_have_differed |= cosine < config.cosine_bound
    if self._kind in STOCHASTIC:
      residual = seen['residual']
      found.append(
        self._alert_on_rise(
          step,
          'sinkhorn',
          'residual of H_res',
          residual,
          config.sinkhorn_bound,
          not residual <= config.sinkhorn_bound,
        )
      )
    return [event for event in found if event]

  def roll_back(self, state: Mapping[str, Any] | None):
    """Goes on from what an earlier step knew, but for what happened since.

    Raises:
      Stop: that was one rollback too many.
    """
    number = self.memory.rollbacks + 1
    if number > self._config.max_rollbacks:
      raise Stop(
        f'{number} rollbacks are more than guards.max_rollbacks: lower '
        'optimizer.learning_rate or guards.rollback_rate, or look at '
        'events.jsonl for what is wrong'
      )
    rate = self.memory.rate * self._config.rollback_rate
    self.memory = GuardState.from_saved(state or {})
    self.memory.rollbacks, self.memory.rate = number, rate

  def _alert_on_rise(
    self, step, guard, metric, value, bound, trouble
  ) -> Event | None:
    """An event if there is trouble that there was not before."""
    active_alerts = self.memory.active_alerts
    if not trouble:
      self.memory.active_alerts = [
        name for name in active_alerts if name != metric
      ]
      return None
    if metric in active_alerts:
      return None
    self.memory.active_alerts = [*active_alerts, metric]
    policy = getattr(self._config, guard)
    return Event(step, guard, metric, float(value), float(bound), policy)


def measures(profile: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a probe (`step.Functions`) that guards look at."""
  rms = np.asarray(profile['stream_rms'], np.float64)
  return {
    'gain': float(
      max(np.max(profile['composite_fwd']), np.max(profile['composite_bwd']))
    ),
    'cosine': float(profile['stream_cosine'][-1]),
    'growth': float(rms.max() / rms[0]),
    'residual': float(
      max(np.max(profile['row_residual']), np.max(profile['column_residual']))
    ),
  }


def most_severe(events: list[Event]) -> str:
  """The policy to follow; '' without events."""
  return max((e.policy for e in events), key=SEVERITY.index, default='')
