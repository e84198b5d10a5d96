"""The learning rate of each design, chosen on seeds that are not reported.

The rate with the lowest mean held-out loss over the tuning panel's seeds, the
lower one of equals. A best rate at an edge of the grid is no best rate: the
contrasts of that design are then not tested.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

RATE = 'optimizer.learning_rate'
UNTRAINED = math.log(256)  # nats of a model of bytes that knows nothing


class Choice(NamedTuple):
  """A design's rate, and the mean losses it was chosen by, by rate."""

  rate: float
  at_edge: bool
  losses: dict[float, float]
  # Mean over the grid of min(loss, loss at the start) - best: how much a wrong
  # rate costs (arXiv 2309.14322, there with the loss at initialisation).
  sensitivity: float


def choose(
  rows: Sequence[dict], initial_nats: float = UNTRAINED
) -> dict[str, Choice]:
  """The choice of each design among the rows of a tuning panel.

  Args:
    rows: with 'variant', 'lr' and 'heldout_nats' (None if not finite).
    initial_nats: loss of a model that knows nothing, which caps a diverged run.
  """
  by_design: dict[str, dict[float, list[float]]] = {}
  for row in rows:
    loss = row['heldout_nats']
    finite = loss is not None and math.isfinite(loss)
    rates = by_design.setdefault(row['variant'], {})
    rates.setdefault(row['lr'], []).append(loss if finite else math.inf)
  choices = {}
  for design, rates in by_design.items():
    losses = {rate: float(np.mean(rates[rate])) for rate in sorted(rates)}
    best = min(losses, key=lambda rate, losses=losses: (losses[rate], rate))
    capped = [min(loss, initial_nats) for loss in losses.values()]
    choices[design] = Choice(
      best,
      best in (min(losses), max(losses)),
      losses,
      float(np.mean(capped)) - min(losses[best], initial_nats),
    )
  return choices
