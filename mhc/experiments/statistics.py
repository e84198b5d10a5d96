r"""Statistics of paired comparisons: what was seen, and what could have been.

A contrast of two designs is the differences d_1 ... d_N of their held-out
losses, seed by seed: the same data order and initial weights on both sides. Its
questions, and the answers here:

    how large?               mean, t interval                  `paired`
    is there a difference?   paired t-test, Holm's correction  `paired`, `holm`
    is there none?           two one-sided t-tests (TOST)      `paired`
    what could be seen?      minimum detectable effect         `mde`
    how many seeds for x?    the inverse of that               `seeds_needed`
    for other text as well?  seeds and text as random effects  `crossed`
    how often does it spike? Clopper-Pearson, Fisher's exact   `proportion`
    how much larger?         geometric means, ratios on a log  `log_ratio`

Differences are taken as normal with an unknown spread. An exact test without
that assumption, by flipping signs, stands beside; with N seeds its smallest p
is 2^(1-N), so that four or five can never reach 0.05 by it. numpy and scipy
alone.
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize
from scipy import stats

Numbers = Sequence[float] | np.ndarray

ALPHA, POWER = 0.05, 0.8
# Signs are flipped in every way up to this many seeds, beyond it at random.
EXACT_SEEDS = 16


class Interval(NamedTuple):
  """An estimate with its confidence interval."""

  value: float
  low: float
  high: float


class Paired(NamedTuple):
  """One contrast; losses in nats a token."""

  n: int
  mean: float
  sd: float  # over seeds
  low: float  # 95 % t interval
  high: float
  p: float  # paired t-test, two-sided
  p_sign_flip: float
  num_below: int  # seeds with a difference below 0
  p_equivalence: float  # TOST against the margin
  mde: float  # seen in 80 % of comparisons like this one


def paired(
  differences: Numbers, *, margin: float, num_contrasts: int = 1
) -> Paired:
  """Estimates the mean of paired differences and tests it.

  Args:
    differences: one a seed, at least two, finite.
    margin: differences within +- margin count as equivalent.
    num_contrasts: declared together with this one; `mde` is at the level
      ALPHA / num_contrasts, the first and hardest step of Holm's procedure.

  Raises:
    ValueError: fewer than two differences, or one that is not finite.
  """
  d = np.asarray(differences, np.float64)
  if len(d) < 2 or not np.isfinite(d).all():
    raise ValueError(
      f'a contrast needs at least two finite differences, got {d.tolist()}'
    )
  n, mean, sd = len(d), float(d.mean()), float(d.std(ddof=1))
  half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * sd / math.sqrt(n)
  p, *p_outside = _tails([abs(mean), margin + mean, margin - mean], sd, n)
  return Paired(
    n=n,
    mean=mean,
    sd=sd,
    low=mean - half,
    high=mean + half,
    p=min(1.0, 2 * p),
    p_sign_flip=sign_flip(d),
    num_below=int((d < 0).sum()),
    p_equivalence=max(p_outside),
    mde=mde(sd, n, num_contrasts),
  )


def _tails(distances, sd, n):
  """P(T_{n-1} > distance / standard error) of each, also for a spread of 0."""
  if sd == 0:
    return [0.0 if d > 0 else 0.5 if d == 0 else 1.0 for d in distances]
  errors = np.array(distances) * (math.sqrt(n) / sd)
  return stats.t.sf(errors, n - 1).tolist()


def sign_flip(differences: Numbers) -> float:
  """The exact two-sided p of the mean under random signs.

  The share of the 2^N ways to choose signs whose mean is as far from 0; beyond
  EXACT_SEEDS seeds, of 2^EXACT_SEEDS random ones, the observed one included.
  """
  d = np.abs(np.asarray(differences, np.float64))
  n, seen = len(d), abs(float(np.sum(differences)))
  if n <= EXACT_SEEDS:
    signs = np.array([*itertools.product((-1.0, 1.0), repeat=n)])
    extra = 0
  else:
    rng = np.random.default_rng(0)
    signs = rng.choice((-1.0, 1.0), (2**EXACT_SEEDS, n))
    extra = 1
  # Sums that are equal may differ in their last bits.
  hits = int((np.abs(signs @ d) >= seen - 1e-12 * d.sum()).sum())
  return (hits + extra) / (len(signs) + extra)


def mde(
  sd: float,
  n: int,
  num_contrasts: int = 1,
  alpha: float = ALPHA,
  power: float = POWER,
) -> float:
  """The minimum detectable effect of a paired t-test of n seeds.

  The true mean difference that is found with probability `power` at the level
  alpha / num_contrasts, by the noncentral t distribution; for large n this is
  (z_{1 - alpha/2} + z_power) sd / sqrt(n).
  """
  return sd / math.sqrt(n) * _noncentrality(n, alpha / num_contrasts, power)


@functools.cache
def _noncentrality(n, alpha, power):
  """The shift at which |T_{n-1}| is critical with probability `power`."""
  critical = stats.t.ppf(1 - alpha / 2, n - 1)
  # T = (Z + shift) / spread: over the distribution of the estimated spread.
  ranks = (np.arange(4000) + 0.5) / 4000
  bound = critical * np.sqrt(stats.chi2.ppf(ranks, n - 1) / (n - 1))

  def missing(shift):
    beyond = stats.norm.cdf(shift - bound) + stats.norm.cdf(-shift - bound)
    return beyond.mean() - power

  return optimize.brentq(missing, 0, 10 + 3 * critical)


def seeds_needed(
  sd: float, difference: float, num_contrasts: int = 1, most: int = 10_000
) -> int:
  """The fewest seeds whose `mde` is at most `difference`; `most` for more."""
  low, high = 1, 2
  while high < most and mde(sd, high, num_contrasts) > difference:
    low, high = high, 2 * high
  high = min(high, most)
  while high - low > 1:
    middle = (low + high) // 2
    if mde(sd, middle, num_contrasts) > difference:
      low = middle
    else:
      high = middle
  return high


def holm(p_values: Numbers) -> list[float]:
  """Holm's adjusted p-values: all below ALPHA are differences, jointly.

  The probability of one false among them is at most ALPHA, however the tests
  depend on each other.
  """
  p = np.asarray(p_values, np.float64)
  order = np.argsort(p, kind='stable')
  steps = p[order] * (len(p) - np.arange(len(p)))
  adjusted = np.empty_like(p)
  adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
  return adjusted.tolist()


def crossed(differences: np.ndarray) -> Interval:
  """Mean of differences [seeds, blocks of text], for other seeds AND texts.

  All seeds are scored on the same text: how much that text favours one side is
  the same in each of them and absent from the spread over seeds. Both are
  random effects here,

      Var(mean) = V_seed / S + V_text / R - V_rest / (S R),

  with V the variances of the means over the other index and of what remains,
  and the interval is by t with Satterthwaite's degrees of freedom.
  """
  d = np.asarray(differences, np.float64)
  seeds, blocks = d.shape
  by_seed, by_block = d.mean(axis=1), d.mean(axis=0)
  mean = float(d.mean())
  rest = d - by_seed[:, None] - by_block[None] + mean
  degrees = (seeds - 1) * (blocks - 1)
  v_seed, v_text = by_seed.var(ddof=1) / seeds, by_block.var(ddof=1) / blocks
  v_rest = float((rest**2).sum()) / degrees / (seeds * blocks)
  variance = max(v_seed + v_text - v_rest, v_seed, v_text)
  if variance == 0:
    return Interval(mean, mean, mean)
  parts = v_seed**2 / (seeds - 1) + v_text**2 / (blocks - 1)
  quantile = float(stats.t.ppf(1 - ALPHA / 2, variance**2 / parts))
  half = quantile * math.sqrt(variance)
  return Interval(mean, mean - half, mean + half)


def proportion(hits: int, n: int) -> Interval:
  """hits / n with the exact 95 % interval of Clopper and Pearson."""
  found = stats.binomtest(hits, n).proportion_ci(1 - ALPHA, method='exact')
  return Interval(hits / n, float(found.low), float(found.high))


def fisher(hits: int, n: int, other_hits: int, other_n: int) -> float:
  """Fisher's exact two-sided p that two proportions are the same."""
  table = [[hits, n - hits], [other_hits, other_n - other_hits]]
  return float(stats.fisher_exact(table).pvalue)


def geometric_mean(values: Numbers) -> float:
  """exp(mean(log values)), for gains, which multiply; inf for one infinite."""
  with np.errstate(divide='ignore'):
    return float(np.exp(np.log(np.asarray(values, np.float64)).mean()))


def log_ratio(above: Numbers, below: Numbers) -> Interval:
  """The geometric mean of the paired ratios, with a t interval of their logs.

  Without an interval (nan) for one pair, or where a value is not finite.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    logs = np.log(np.asarray(above, float)) - np.log(np.asarray(below, float))
  mean = float(logs.mean())
  if len(logs) < 2 or not np.isfinite(logs).all():
    return Interval(float(np.exp(mean)), math.nan, math.nan)
  half = stats.t.ppf(1 - ALPHA / 2, len(logs) - 1) * logs.std(ddof=1)
  half = float(half) / math.sqrt(len(logs))
  with np.errstate(over='ignore'):
    return Interval(*np.exp([mean, mean - half, mean + half]).tolist())
