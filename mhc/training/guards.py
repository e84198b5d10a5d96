r"""Guards against diverging runs: each raises alerts and has a policy.

    guard       metric             alert
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
The device receives the loss above which a step is a spike, so that it can skip
the update at once. The first two guards check every step, the others the steps
at which the run is probed.

The events of a step are a function of the metrics up to it alone: a resumed run
raises the same. An `Event` marks the start of an alert and is not repeated
while it lasts.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from mhc import config as config_lib

# Kinds whose H_res should have the row and column sums of a permutation.
STOCHASTIC = frozenset(config_lib.KINDS) - {
  *('hc', 'orthogonal', 'dense_former', 'x0', 'wide_residual', 'frac')
}
SEVERITY = ('log', 'skip_step', 'rollback', 'stop')
# There is no limit on the loss before the window holds as many losses.
LEAST = 16


class Stop(ValueError):
  """A guard ended the run."""


class Event(NamedTuple):
  """An alert that began at a step, and the `policy` for it."""

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
  """What guards keep of earlier steps; saved in checkpoints."""

  losses: list[float] = dataclasses.field(default_factory=list)
  # Loss limits of the next two steps: a step is dispatched before the metrics
  # of the last one are fetched.
  limits: list[float | None] = dataclasses.field(
    default_factory=lambda: [None, None]
  )
  active_alerts: list[str] = dataclasses.field(default_factory=list)
  streams_have_differed: bool = False  # cosine has been below its bound
  skipped: int = 0  # updates skipped in a row
  rollbacks: int = 0
  rate: float = 1.0  # factor on the learning rate

  @classmethod
  def from_saved(cls, state: Mapping[str, Any]) -> 'GuardState':
    """Reads the state in a checkpoint; former names for one release."""
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
    """Returns the loss above which the next step is a spike; once a step."""
    limit = self.memory.limits.pop(0)
    return math.inf if limit is None else limit

  def step(
    self, step: int, limit: float, values: Mapping[str, float]
  ) -> list[Event]:
    """Returns the events of a step's metrics; `limit` was its loss limit."""
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
    """The loss limit of the step after next; None for too few losses."""
    losses = np.array(self.memory.losses)
    if len(losses) < LEAST:
      return None
    median = float(np.median(losses))
    spread = 1.4826 * float(np.median(np.abs(losses - median)))
    return median + self._config.spike_score * max(spread, 1e-3 * abs(median))

  def probe(self, step: int, seen: Mapping[str, float]) -> list[Event]:
    """Returns the events of a probe after a step, from its `measures`."""
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
    """Restores the state of an earlier step, except for rollbacks and rate.

    Raises:
      Stop: there were more than guards.max_rollbacks.
    """
    number = self.memory.rollbacks + 1
    if number > self._config.max_rollbacks:
      raise Stop(
        f'{number} rollbacks are more than '
        f'guards.max_rollbacks={self._config.max_rollbacks}: reduce '
        'optimizer.learning_rate or guards.rollback_rate; events.jsonl has the '
        'alerts'
      )
    rate = self.memory.rate * self._config.rollback_rate
    self.memory = GuardState.from_saved(state or {})
    self.memory.rollbacks, self.memory.rate = number, rate

  def _alert_on_rise(
    self, step, guard, metric, value, bound, alert
  ) -> Event | None:
    """Returns an event for an alert that was not active before."""
    active_alerts = self.memory.active_alerts
    if not alert:
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
  """The numbers of a probe (`step.probe`) that guards check."""
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
  """Returns the most severe policy of the events; '' without events."""
  return max((e.policy for e in events), key=SEVERITY.index, default='')
