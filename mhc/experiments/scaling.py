r"""How a gap, or what a design is worth in compute, changes over sizes.

Cells are sizes: at size i, seeds s have trained the plain residual and a design
with the same data and weights. Everything is estimated from the cells' means;
intervals come from a bootstrap that draws seeds anew within each size, a seed
of both designs together. Few seeds understate their spread, so residuals are
scaled by sqrt(N / (N - 1)) and the spread of the draws is multiplied by a t
quantile instead of the normal one. Sizes weigh unequally (the ends make a
slope), so its degrees of freedom are Satterthwaite's, not the sum of N - 1.
"""

from collections.abc import Callable, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from mhc.experiments.statistics import Interval
from mhc.experiments.statistics import Numbers

DRAWS = 400
# Sizes that a law with three constants is fitted to.
MIN_SIZES = 4
Cells = Sequence[np.ndarray]  # a size each: [..., seeds]


class Trend(NamedTuple):
  """gap = value at the mean size + slope (log10 size - mean log10 size)."""

  level: Interval
  slope: Interval  # nats a decade
  band: np.ndarray  # [points, 3]: log10 size, low, high
  verdict: str


class Law(NamedTuple):
  """loss = floor + scale compute^-exponent; each [..., 1]."""

  floor: np.ndarray
  scale: np.ndarray
  exponent: np.ndarray

  def loss(self, compute):
    return self.floor + self.scale * np.asarray(compute) ** -self.exponent

  def compute(self, loss):
    """The compute at which the law has this loss; inf at or below its floor."""
    above = np.maximum(np.asarray(loss, float) - self.floor, 0)
    with np.errstate(divide='ignore', over='ignore'):
      return (above / self.scale) ** (-1 / self.exponent)


class Multiplier(NamedTuple):
  """Compute the residual needs for a design's loss, over the design's own."""

  overall: Interval  # geometric mean over sizes
  by_size: np.ndarray  # [sizes]


def trend(sizes: Numbers, gaps: Cells, level: float = 0.95) -> Trend:
  """A line through the gaps over log10 size, each size weighted by its seeds.

  Raises:
    ValueError: fewer than two sizes, or a size with fewer than two seeds.
  """
  _check(sizes, gaps, 2)
  x = np.log10(np.asarray(sizes, float))
  weights = np.array([cell.shape[-1] for cell in gaps], float)
  middle = np.average(x, weights=weights)

  points = np.linspace(x[0], x[-1], 41)

  def line(means):  # of gaps at each size [draws]
    y, centred = np.stack(means, axis=-1), weights * (x - middle)
    mean = (y @ weights / weights.sum())[:, None]
    slope = (y @ centred / (centred @ (x - middle)))[:, None]
    return np.hstack([mean, slope, mean + slope * (points - middle)])

  fitted, half = bootstrap(line, gaps, level)
  low, high = fitted - half, fitted + half
  level_, slope = (
    Interval(float(fitted[i]), float(low[i]), float(high[i])) for i in (0, 1)
  )
  resolved = slope.low > 0 or slope.high < 0
  # A gap below zero that rises towards it shrinks.
  shrinks = slope.value * level_.value < 0
  verdict = 'slope not resolved'
  if resolved:
    verdict = 'the gap shrinks' if shrinks else 'the gap grows'
  band = np.stack([points, low[2:], high[2:]], axis=1)
  return Trend(level_, slope, band, verdict)


def power_law(compute: Numbers, loss: Numbers) -> Law:
  """Least squares of loss = floor + scale compute^-exponent.

  For each exponent the other two follow linearly; the exponent is the best of
  a grid from 0.01 to 2, refined by parabolas through it and both its sides,
  closer each time.
  Four sizes or more determine it.

  Args:
    compute: [sizes].
    loss: [..., sizes]; each leading index is fitted on its own.
  """
  c, y = np.asarray(compute, float), np.asarray(loss, float)
  unit = math.exp(np.log(c).mean())
  relative = np.log(c / unit)
  centred = y - y.mean(axis=-1, keepdims=True)

  def scale_and_error(exponent):  # [..., 1] each, of exponents [..., 1]
    shape = np.exp(-relative * exponent)
    shape = shape - shape.mean(axis=-1, keepdims=True)
    power = (shape**2).sum(axis=-1, keepdims=True)
    scale = (centred * shape).sum(axis=-1, keepdims=True) / power
    return scale, ((centred - scale * shape) ** 2).sum(axis=-1, keepdims=True)

  logs = np.linspace(math.log(0.01), math.log(2), 61)
  shapes = np.exp(-relative * np.exp(logs)[:, None])
  shapes -= shapes.mean(axis=-1, keepdims=True)
  shapes /= np.linalg.norm(shapes, axis=-1, keepdims=True)
  # The least error is the largest part that lies along the shape.
  log = logs[np.abs(centred @ shapes.T).argmax(axis=-1)][..., None]
  step = logs[1] - logs[0]
  for _ in range(3):
    left, middle, right = (
      scale_and_error(np.exp(log + side))[1] for side in (-step, 0, step)
    )
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / np.where(bend > 0, bend, np.inf)
    log = np.clip(log + np.clip(shift, -1, 1) * step, logs[0], logs[-1])
    step /= 16
  exponent = np.exp(log)
  scale, _ = scale_and_error(exponent)
  mean_shape = np.exp(-relative * exponent).mean(axis=-1, keepdims=True)
  floor = y.mean(axis=-1, keepdims=True) - scale * mean_shape
  return Law(floor, scale * unit**exponent, exponent)


def multiplier(
  compute: Numbers,
  cost_ratio: Numbers,
  losses: Cells,
  level: float = 0.95,
) -> Multiplier:
  """The compute multiplier of a design over the residual.

  At each size, the residual's compute at which its law has the design's mean
  loss, over the residual's compute of that size, over `cost_ratio`.

  Args:
    compute: training FLOPs of the residual at each size, four or more.
    cost_ratio: the design's cost over the residual's at each size: its FLOPs
      for a multiplier in FLOPs, its step time for one in time.
    losses: [2, seeds] at each size, residual first.

  Raises:
    ValueError: fewer than four sizes, or a size with fewer than two seeds.
  """
  _check(compute, losses, MIN_SIZES)
  c, ratio = np.asarray(compute, float), np.asarray(cost_ratio, float)

  def logs(means):  # of losses at each size [draws, 2]
    both = np.stack(means, axis=-1)
    needed = power_law(c, both[:, 0]).compute(both[:, 1])
    by_size = np.log(needed / c / ratio)
    return np.append(by_size, by_size.mean(axis=-1, keepdims=True), axis=-1)

  estimate, half = bootstrap(logs, losses, level)
  with np.errstate(over='ignore', invalid='ignore'):
    overall = np.exp(estimate[-1] + half[-1] * np.array([0.0, -1.0, 1.0]))
  overall[0] = np.exp(estimate[-1])  # whatever the interval
  return Multiplier(Interval(*overall.tolist()), np.exp(estimate[:-1]))


def bootstrap(
  statistic: Callable[[list[np.ndarray]], np.ndarray],
  cells: Cells,
  level: float,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """(estimate [k], half-width of its interval [k]); inf if too wide to draw.

  `statistic` takes the means over seeds of each cell, [draws, ...], to [draws,
  k].
  """
  rng = np.random.default_rng(seed)
  draws = statistic([_drawn_means(rng, cell) for cell in cells])
  (estimate,) = statistic([cell.mean(axis=-1)[None] for cell in cells])
  finite = draws[np.isfinite(draws).all(axis=1)]
  if len(finite) < 0.9 * DRAWS:
    spread = np.full(draws.shape[1], np.inf)
  else:
    spread = finite.std(axis=0, ddof=1)
  return estimate, spread * _quantile(statistic, estimate, cells, level)


def _drawn_means(rng, cell):
  """Means of seeds drawn anew [DRAWS, ...], residuals unbiased in spread."""
  n = cell.shape[-1]
  mean = cell.mean(axis=-1, keepdims=True)
  drawn = (cell - mean)[..., rng.integers(0, n, (DRAWS, n))].mean(axis=-1)
  return np.moveaxis(mean + drawn * math.sqrt(n / (n - 1)), -1, 0)


def _quantile(statistic, estimate, cells, level):
  """The t quantile of a statistic [k], with Satterthwaite's degrees of freedom.

  A cell's part of the variance is the jackknife's: its seeds left out in turn.
  """
  counts = [cell.shape[-1] for cell in cells]
  without = []  # means of each cell [sum of counts, ...]
  for i, (cell, n) in enumerate(zip(cells, counts, strict=True)):
    mean = cell.mean(axis=-1)
    rows = [np.repeat(mean[None], count, axis=0) for count in counts]
    rows[i] = mean + np.moveaxis(mean[..., None] - cell, -1, 0) / (n - 1)
    without.append(np.concatenate(rows))
  with np.errstate(invalid='ignore', divide='ignore'):
    squares = (statistic(without) - estimate) ** 2
    cuts = np.cumsum(counts)[:-1]
    each = [part.mean(axis=0) for part in np.split(squares, cuts)]
    parts = np.stack([v * (n - 1) for v, n in zip(each, counts, strict=True)])
    free = np.array(counts)[:, None] - 1
    degrees = parts.sum(axis=0) ** 2 / (parts**2 / free).sum(axis=0)
  degrees = np.where(np.isfinite(degrees), degrees, free.sum())
  return stats.t.ppf(0.5 + level / 2, degrees)


def _check(sizes, cells, least):
  if len(sizes) < least:
    raise ValueError(f'{len(sizes)} sizes are too few: give {least} or more')
  few = [i for i, cell in enumerate(cells) if cell.shape[-1] < 2]
  if few:
    raise ValueError(f'size {sizes[few[0]]:g} has fewer than two seeds')
