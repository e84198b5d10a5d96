"""Planted laws, trends and multipliers are found, with intervals that cover."""

import math

import numpy as np
import pytest
from scipy import stats

from mhc.experiments import scaling

COMPUTE = np.geomspace(1, 64, 5)
SIZES = COMPUTE.tolist()
RATIO = 1.1  # of the cost of a planted design
# (sd of a seed's loss, of the designs' difference, seeds)
NOISE = [(0.002, 0.002, 4), (0.01, 0.002, 4), (0.01, 0.01, 5)]


def law(compute):
  return 2 + compute**-0.3


def cells(rng, shared, own, n, worth=1.25):
  """[2, seeds] a size; the design is worth `worth` times its compute."""
  true = np.stack([law(COMPUTE), law(COMPUTE * worth * RATIO)], axis=1)
  seeds = shared * rng.normal(size=(5, 1, n))
  pairs = own / math.sqrt(2) * rng.normal(size=(5, 2, n))
  return [*(true[:, :, None] + seeds + pairs)]


def within(share, wanted, trials):
  """Whether a share seen in trials is as near as in 99.9 % of times."""
  low, high = stats.binom.interval(0.999, trials, wanted) / np.array(trials)
  return low <= share <= high


def test_a_planted_multiplier_is_covered():
  """In 87 to 93 % of simulations, by the 90 % interval; no bias of 1 %."""
  trials, shares = 100, []
  for noise in NOISE:
    rng = np.random.default_rng(1)
    found = np.array(
      [
        scaling.multiplier(SIZES, [RATIO] * 5, cells(rng, *noise), 0.9)[0]
        for _ in range(trials)
      ]
    )
    covered = (found[:, 1] <= 1.25) & (found[:, 2] >= 1.25)
    shares.append(covered.mean())
    assert within(shares[-1], 0.9, trials), noise
    assert abs(np.log(found[:, 0]).mean() - math.log(1.25)) < 0.01
    assert (found[:, 1] < found[:, 0]).all()
  assert 0.87 <= np.mean(shares) <= 0.93


def test_a_multiplier_without_noise_and_of_more_cost():
  quiet = cells(np.random.default_rng(0), 0, 0, 4)
  found = scaling.multiplier(SIZES, [RATIO] * 5, quiet)
  np.testing.assert_allclose(found.overall, [1.25] * 3, rtol=1e-6)
  np.testing.assert_allclose(found.by_size, [1.25] * 5, rtol=1e-6)
  noisy = cells(np.random.default_rng(0), 0.01, 0.002, 4)
  base = scaling.multiplier(SIZES, [1.0] * 5, noisy)
  costs = np.array([1.0, 1.1, 1.2, 1.5, 2.0])
  dear = scaling.multiplier(SIZES, costs.tolist(), noisy)
  mean = math.exp(np.log(costs).mean())
  np.testing.assert_allclose(dear.by_size, base.by_size / costs)
  np.testing.assert_allclose(dear.overall, np.array(base.overall) / mean)
  np.testing.assert_allclose(
    scaling.multiplier([1e18 * c for c in SIZES], [1.0] * 5, noisy).overall,
    base.overall,
  )
  wider = scaling.multiplier(SIZES, [1.0] * 5, noisy, 0.99).overall
  assert wider.low < base.overall.low < base.overall.high < wider.high


def test_below_the_floor_of_the_residual_no_compute_suffices():
  quiet = cells(np.random.default_rng(0), 0, 0.001, 4)
  below = [cell - np.array([[0.0], [0.8]]) for cell in quiet]
  found = scaling.multiplier(SIZES, [RATIO] * 5, below)
  assert found.overall.value == math.inf
  assert not found.overall.high < math.inf
  assert (found.by_size == math.inf).any()
  # At the floor, draws fall to both its sides.
  near = scaling.multiplier(
    SIZES, [RATIO] * 5, cells(np.random.default_rng(1), 0, 0.05, 4, 50.0)
  )
  assert (near.overall.low, near.overall.high) == (0, math.inf)


def test_a_planted_law_is_recovered():
  """Without noise, of any leading dimensions and units of compute."""
  floor = np.array([0.5, 2.0, 3.0])[:, None, None]
  exponent = np.array([0.05, 0.3, 0.7, 1.5])[:, None]
  for unit in (1.0, 1e18):
    compute = COMPUTE * unit
    loss = floor + 1.3 * (compute / unit) ** -exponent  # [3, 4, sizes]
    found = scaling.power_law(compute.tolist(), loss)
    ones = np.ones((3, 4, 1))
    np.testing.assert_allclose(found.exponent, exponent * ones, rtol=1e-6)
    np.testing.assert_allclose(found.floor, floor * ones, rtol=1e-5)
    scale = found.scale / unit**found.exponent
    np.testing.assert_allclose(scale, 1.3 * ones, rtol=1e-5)
    np.testing.assert_allclose(found.loss(compute), loss, rtol=1e-7)
    one = scaling.power_law(compute.tolist(), loss[1, 2].tolist())
    np.testing.assert_allclose(one.floor, found.floor[1, 2])


def test_a_law_has_the_least_squares():
  """No neighbour in any of the three constants is better."""
  rng = np.random.default_rng(0)
  loss = law(COMPUTE) + 0.02 * rng.normal(size=(20, 5))
  found = scaling.power_law(SIZES, loss)
  inner = (found.exponent > 0.0101) & (found.exponent < 1.99)
  assert inner.mean() > 0.8
  least = ((found.loss(COMPUTE) - loss) ** 2).sum(axis=1, keepdims=True)
  for i in range(3):
    for side in (-1e-3, 1e-3):
      moved = [*found]
      moved[i] = moved[i] * (1 + side)
      error = (scaling.Law(*moved).loss(COMPUTE) - loss) ** 2
      assert ((error.sum(axis=1, keepdims=True) > least) | ~inner).all()


def test_compute_is_the_inverse_of_loss():
  found = scaling.Law(np.array([2.0]), np.array([1.5]), np.array([0.4]))
  compute = np.geomspace(1e-3, 1e12, 16)
  np.testing.assert_allclose(found.compute(found.loss(compute)), compute)
  assert found.compute(np.array([2.0, 1.0])).tolist() == [math.inf] * 2
  flat = scaling.Law(np.array([2.0]), np.array([1.0]), np.array([0.01]))
  assert flat.compute(np.array([2.0001])).tolist() == [math.inf]  # 1e400


def gaps(rng, level, slope, sd, counts=(4, 4, 4, 4, 4)):
  x = np.log10(COMPUTE)
  means = level + slope * (x - x.mean())
  return [
    mean + sd * rng.normal(size=n)
    for mean, n in zip(means, counts, strict=True)
  ]


@pytest.mark.parametrize('counts', [(4,) * 5, (8, 6, 5, 4, 3)])
def test_a_planted_slope_is_covered(counts):
  rng = np.random.default_rng(0)
  trials = 300
  x = np.log10(COMPUTE)
  weighted = -0.3 + 0.05 * (np.average(x, weights=counts) - x.mean())
  found = [
    scaling.trend(SIZES, gaps(rng, -0.3, 0.05, 0.1, counts))
    for _ in range(trials)
  ]
  slopes = np.array([one.slope for one in found])
  levels = np.array([one.level for one in found])
  for seen, true in ((slopes, 0.05), (levels, weighted)):
    covered = (seen[:, 1] <= true) & (seen[:, 2] >= true)
    assert 0.92 <= covered.mean() <= 0.98
    assert within(covered.mean(), 0.95, trials)
    error = seen[:, 0].std(ddof=1) / math.sqrt(trials)
    assert abs(seen[:, 0].mean() - true) < 3.3 * error
  ends = np.array([one.band[-1] for one in found])
  true = -0.3 + 0.05 * (x[-1] - x.mean())
  covered = (ends[:, 1] <= true) & (ends[:, 2] >= true)
  assert within(covered.mean(), 0.95, trials)


def test_a_trend_is_the_weighted_line_and_its_band_is_around():
  rng = np.random.default_rng(0)
  counts = (8, 6, 5, 4, 2)
  seen = gaps(rng, -0.3, 0.1, 0.05, counts)
  found = scaling.trend(SIZES, seen)
  x = np.repeat(np.log10(COMPUTE), counts)
  slope, offset = np.polyfit(x, np.concatenate(seen), 1)
  assert found.slope.value == pytest.approx(slope)
  assert found.level.value == pytest.approx(offset + slope * x.mean())
  points, low, high = found.band.T
  np.testing.assert_allclose((low + high) / 2, offset + slope * points)
  width = high - low
  assert width.argmin() not in (0, len(points) - 1)
  assert (points[0], points[-1]) == (0, pytest.approx(math.log10(64)))
  wider = scaling.trend(SIZES, seen, 0.99)
  assert (wider.band[:, 1] < low).all()
  two = scaling.trend([1.0, 10.0], [np.array([1.0, 1.2]), np.array([2.0, 2.2])])
  assert two.slope.value == pytest.approx(1.0)
  assert two.level.value == pytest.approx(1.6)


@pytest.mark.parametrize(
  ('level', 'slope', 'sd', 'verdict'),
  [
    (-0.3, 0.1, 0.01, 'the gap shrinks'),
    (-0.3, -0.1, 0.01, 'the gap grows'),
    (0.3, 0.1, 0.01, 'the gap grows'),
    (0.3, -0.1, 0.01, 'the gap shrinks'),
    (-0.3, 0.0, 0.01, 'slope not resolved'),
    (0.3, 0.1, 1.0, 'slope not resolved'),
  ],
)
def test_a_trend_says_what_the_gap_does(level, slope, sd, verdict):
  seen = gaps(np.random.default_rng(3), level, slope, sd)
  assert scaling.trend(SIZES, seen).verdict == verdict


def test_intervals_are_those_of_the_t_where_it_is_exact():
  """Of equal spreads: the mean has all degrees of freedom, a slope has not."""
  cell = np.array([-1.0, -0.5, 0.5, 1.0])
  near, far = (scaling.trend(SIZES, [cell] * 5, level) for level in (0.5, 0.99))
  # Of five sizes the slope has (4 + 1 + 0 + 1 + 4)^2 / (34 / 3) degrees.
  steps = np.log10(COMPUTE) - np.log10(COMPUTE).mean()
  for name, degrees, sizes in (
    ('level', 15, 5),
    ('slope', 300 / 34, (steps**2).sum()),
  ):
    half, wide = (getattr(one, name).high for one in (near, far))
    quantiles = stats.t.ppf([0.75, 0.995], degrees)
    assert wide / half == pytest.approx(quantiles[1] / quantiles[0])
    error = cell.std(ddof=1) / math.sqrt(4 * sizes)
    assert half == pytest.approx(quantiles[0] * error, rel=0.1)  # 400 draws


def test_two_seeds_are_enough_and_less_is_refused():
  rng = np.random.default_rng(0)
  pairs = cells(rng, 0.01, 0.002, 2)
  found = scaling.multiplier(SIZES, [RATIO] * 5, pairs)
  assert found.overall.low < 1.25 < found.overall.high
  with pytest.raises(ValueError, match='3 sizes are too few: give 4 or more'):
    scaling.multiplier(SIZES[:3], [RATIO] * 3, pairs[:3])
  pairs[2] = pairs[2][:, :1]
  with pytest.raises(ValueError, match='size 8 has fewer than two seeds'):
    scaling.multiplier(SIZES, [RATIO] * 5, pairs)
  with pytest.raises(ValueError, match='size 10 has fewer than two seeds'):
    scaling.trend([1.0, 10.0], [np.zeros(2), np.zeros(1)])
  with pytest.raises(ValueError, match='1 sizes are too few: give 2 or more'):
    scaling.trend([1.0], [np.zeros(4)])
