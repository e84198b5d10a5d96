"""Error rates of the verdicts, and each statistic against its definition."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import optimize
from scipy import stats

from mhc.config import comparison as comparison_lib
from mhc.experiments import contrasts
from mhc.experiments import statistics

ALPHA = statistics.ALPHA
NUMBER = r'(-?[0-9]+\.[0-9]{4})'
WORDED = re.compile(
  rf'(?:lower|higher) by {NUMBER} \[{NUMBER}, {NUMBER}\]'
  r'(?:, within the margin of [0-9.e-]+)?'
  r'|equivalent within [0-9.e-]+'
  rf'|not resolved \(could have seen {NUMBER}\)'
  r'|not tested \(.+\)'
)


def most(share, trials):
  """A binomial count is above it once in a thousand."""
  return stats.binom.ppf(0.999, trials, share) / trials


def contrast(differences, margin=0.01, num_contrasts=1, cosine=None, **kinds):
  differences = tuple(float(d) for d in differences)
  found = None
  if len(differences) > 1 and np.isfinite(differences).all():
    found = statistics.paired(
      differences, margin=margin, num_contrasts=num_contrasts
    )
  names = {'kind': 'mhc', 'other': 'residual', **kinds}
  made = contrasts.Contrast(
    **names,
    panel='p',
    setting={},
    declared=True,
    seeds=list(range(len(differences))),
    differences=list(differences),
    margin=margin,
    cosine=cosine,
    found=found,
    crossed=None,
    reason='',
  )
  pairs = [({'kind': made.kind}, {'kind': made.other})]
  return made._replace(reason=contrasts._reason(made, pairs, {}))


def collected(given):
  """The contrast of mHC and the residual among rows."""
  panel = comparison_lib.Panel(
    kinds=('residual', 'mhc'), num_blocks=(), learning_rates=()
  )
  comparison = comparison_lib.Comparison(panels={'p': panel})
  common = {'panel': 'p', 'setting': {}, 'heldout_blocks': None}
  (made,) = contrasts.collect(comparison, [common | row for row in given])
  return made


def verdicts(*declared):
  """Of contrasts declared together; every one is worded as promised."""
  texts = [judged.verdict for judged in contrasts.judge(declared)]
  for text in texts:
    match = WORDED.fullmatch(text)
    assert match, text
    if text.startswith(('lower', 'higher')):
      value, low, high = (float(match[i]) for i in (1, 2, 3))
      assert 0 <= low <= value <= high, text
  return texts


def differs(text):
  return text.startswith(('lower', 'higher'))


def rows(losses):
  """Rows of {kind: losses by seed}."""
  return [
    {
      'variant': kind,
      'kind': kind,
      'seed': seed,
      'heldout_nats': float(loss),
      'stream_cosine': None,
    }
    for kind, values in losses.items()
    for seed, loss in enumerate(values)
  ]


@pytest.mark.parametrize('n', [4, 5, 8])
def test_families_of_contrasts_keep_their_level_and_power(n):
  """Comparisons of three contrasts, 2,004 in all, half with one residual.

  At most 5 % of comparisons without any difference say that there is one; a
  difference of one `mde` is found in four of five.
  """
  rng = np.random.default_rng(n)
  trials = 334
  step = statistics.mde(1.0, n, 3)
  false = found = 0
  for shared in (False, True):
    losses = rng.normal(size=(trials, 4, n)) / math.sqrt(2)
    others = rng.normal(size=(trials, 3, n)) / math.sqrt(2)
    for three in losses[:, 1:] - (losses[:, :1] if shared else others):
      declared = [contrast(d, num_contrasts=3) for d in three]
      false += any(map(differs, verdicts(*declared)))
      declared[0] = contrast(three[0] + step, num_contrasts=3)
      found += verdicts(*declared)[0].startswith('higher')
  assert false / (2 * trials) <= most(ALPHA, 2 * trials)
  assert 0.75 <= found / (2 * trials) <= 0.85


def tost_margin(n):
  """Where P(|mean| < margin - t sd / sqrt(n)) is 80 %; no difference, sd 1."""
  ranks = (np.arange(20_000) + 0.5) / 20_000
  sd = np.sqrt(stats.chi2.ppf(ranks, n - 1) / (n - 1))
  wanted = stats.t.ppf(1 - ALPHA, n - 1) * sd

  def missing(margin):
    room = margin * math.sqrt(n) - wanted
    return np.maximum(2 * stats.norm.cdf(room) - 1, 0).mean() - 0.8

  return optimize.brentq(missing, 0.1, 10)


@pytest.mark.parametrize('n', [4, 8])
def test_equivalence_keeps_its_level_and_power(n):
  margin = tost_margin(n)
  draws = np.random.default_rng(n).normal(size=(700, n))

  def share(shift):
    texts = [verdicts(contrast(d + shift, margin))[0] for d in draws]
    return np.mean(['within' in text for text in texts])

  assert share(margin) <= most(ALPHA, len(draws))
  assert 0.75 <= share(0.0) <= 0.85


@pytest.mark.parametrize('n', [2, 3, 4, 5, 8, 16, 300])
@pytest.mark.parametrize('num_contrasts', [1, 3])
def test_mde_has_the_power_of_the_noncentral_t(n, num_contrasts):
  level = ALPHA / num_contrasts
  shift = statistics.mde(2.0, n, num_contrasts) * math.sqrt(n) / 2.0
  critical = stats.t.ppf(1 - level / 2, n - 1)
  # The other tail has less than Phi(-4), and scipy gives nan for some.
  power = stats.nct.sf(critical, n - 1, shift)
  np.testing.assert_allclose(power, 0.8, atol=2e-4)


def test_mde_has_its_limit_and_seeds_needed_is_its_inverse():
  n = 10_000
  limit = (stats.norm.ppf(1 - ALPHA / 6) + stats.norm.ppf(0.8)) / math.sqrt(n)
  np.testing.assert_allclose(statistics.mde(1.0, n, 3), limit, rtol=1e-3)
  counts = [*range(2, 12), 20, 50]
  table = np.array(
    [[statistics.mde(1.0, n, k) for n in counts] for k in (1, 2, 3, 6)]
  )
  assert (np.diff(table, axis=1) < 0).all()
  assert (np.diff(table, axis=0) > 0).all()
  assert statistics.mde(3.0, 5) == pytest.approx(3 * statistics.mde(1.0, 5))
  for difference in (0.3, 0.7, 1.0, 2.5, 1e3):
    for k in (1, 3):
      n = statistics.seeds_needed(1.0, difference, k)
      assert statistics.mde(1.0, n, k) <= difference
      assert n == 2 or statistics.mde(1.0, n - 1, k) > difference
  for n in (2, 4, 5, 8, 16, 17):
    assert statistics.seeds_needed(1.5, statistics.mde(1.5, n, 3), 3) == n
  assert statistics.seeds_needed(1.0, 0.01, most=40) == 40
  assert statistics.seeds_needed(0.0, 0.01) == 2


def closed(p):
  """A hypothesis falls if every intersection with it does, by Bonferroni."""
  indices = range(len(p))
  subsets = [s for k in indices for s in itertools.combinations(indices, k + 1)]
  return [
    max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
    for i in indices
  ]


@pytest.mark.parametrize('size', [1, 2, 3, 4])
def test_holm_is_the_closure_of_bonferroni(size):
  rng = np.random.default_rng(size)
  draws = rng.uniform(size=(150, size)) ** rng.integers(1, 5, (150, 1))
  for p in [*draws, *np.round(draws, 1)]:  # with ties, zeros and ones
    adjusted = statistics.holm(p)
    np.testing.assert_allclose(adjusted, closed(p), rtol=1e-14)
    order = rng.permutation(size)
    np.testing.assert_array_equal(
      statistics.holm(p[order]), np.array(adjusted)[order]
    )
    if size == 1:
      assert adjusted == p.tolist()
  assert statistics.holm([]) == []


@pytest.mark.parametrize('n', [2, 4, 5, 8, 20])
def test_paired_is_the_t_test_of_scipy(n):
  rng = np.random.default_rng(n)
  for shift in (0.0, 0.4, -2.0):
    d, margin = rng.normal(shift, 1.3, n), 0.9
    found = statistics.paired(d, margin=margin, num_contrasts=3)
    want = stats.ttest_1samp(d, 0)
    interval = want.confidence_interval(0.95)
    below = stats.ttest_1samp(d, margin, alternative='less').pvalue
    above = stats.ttest_1samp(d, -margin, alternative='greater').pvalue
    np.testing.assert_allclose(
      [found.p, found.low, found.high, found.p_equivalence, found.sd],
      [want.pvalue, *interval, max(below, above), np.std(d, ddof=1)],
      rtol=1e-10,
    )
    assert (found.n, found.mean) == (n, pytest.approx(d.mean()))
    assert found.num_below == sum(d < 0)
    assert found.mde == statistics.mde(found.sd, n, 3)
    assert found.p_sign_flip == statistics.sign_flip(d)


def test_differences_without_spread_and_those_refused():
  for value, p_same in ((0.25, 0.0), (-0.5, 0.5), (1.0, 1.0), (0.0, 0.0)):
    found = statistics.paired([value] * 4, margin=0.5)
    assert found.low == found.mean == found.high == value
    assert found.sd == found.mde == 0
    assert found.p == (value == 0)
    assert found.p_equivalence == p_same
  for bad in ([], [0.1], [0.1, math.nan], [0.1, math.inf, 0.2]):
    with pytest.raises(ValueError, match='at least two finite differences'):
      statistics.paired(bad, margin=0.01)


def test_sign_flip_counts_the_ways_to_choose_signs():
  rng = np.random.default_rng(0)
  small = [rng.integers(-4, 5, size) for size in (2, 3, 4, 5, 8) * 10]
  # Tenths are not exact, and sums of theirs differ in the last bit.
  for d, unit in itertools.product(small, (1.0, 0.1)):
    ways = [
      abs(np.dot(signs, d))
      for signs in itertools.product((-1, 1), repeat=len(d))
    ]
    want = np.mean(np.array(ways) >= abs(d.sum()))
    assert statistics.sign_flip(d * unit) == want, d
  for n in (4, 5, 16):
    assert statistics.sign_flip(rng.uniform(1, 2, n)) == 2.0 ** (1 - n)
  sums = np.zeros(1)
  d = rng.normal(0.3, 1, 20)
  for value in d:
    sums = np.concatenate([sums + value, sums - value])
  want = (np.abs(sums) >= abs(d.sum()) - 1e-9).mean()
  assert statistics.sign_flip(d) == pytest.approx(want, abs=0.01)
  assert statistics.sign_flip(np.ones(40)) == 1 / (1 + 2**16)


@pytest.mark.parametrize(
  ('seed_sd', 'text_sd', 'rest_sd'),
  [(1, 0.2, 1), (0.2, 2, 1), (0.6, 1.7, 3)],
)
def test_crossed_covers_for_other_seeds_and_texts(seed_sd, text_sd, rest_sd):
  rng = np.random.default_rng(0)
  trials, seeds, blocks = 1000, 5, 24
  d = (
    0.3
    + seed_sd * rng.normal(size=(trials, seeds, 1))
    + text_sd * rng.normal(size=(trials, 1, blocks))
    + rest_sd * rng.normal(size=(trials, seeds, blocks))
  )
  found = np.array([statistics.crossed(one) for one in d])
  covered = (found[:, 1] <= 0.3) & (found[:, 2] >= 0.3)
  np.testing.assert_allclose(found[:, 0], d.mean(axis=(1, 2)))
  assert 0.92 <= covered.mean() <= 0.99
  if text_sd > 1.9:
    interval = stats.ttest_1samp(d.mean(axis=2), 0.3, axis=1)
    assert (interval.pvalue > ALPHA).mean() < 0.6
  if text_sd < 0.5:  # then it is the t interval over seeds, or little wider
    half = (found[:, 2] - found[:, 1]) / 2
    plain = stats.t.ppf(0.975, seeds - 1) * stats.sem(d.mean(axis=2), axis=1)
    assert 0.95 < np.median(half / plain) < 1.1


def test_crossed_without_spread():
  assert statistics.crossed(np.full((3, 4), 0.5)) == (0.5, 0.5, 0.5)


def test_proportions_are_clopper_and_pearsons():
  for n in (1, 4, 7, 20):
    for hits in range(n + 1):
      found = statistics.proportion(hits, n)
      assert found.value == hits / n
      low = stats.beta.ppf(0.025, hits, n - hits + 1) if hits else 0
      high = stats.beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1
      np.testing.assert_allclose(found[1:], [low, high], atol=1e-9)


def test_more_seeds_never_make_spikes_likelier():
  """At one rate of both kinds, for all outcomes of n runs of each."""
  rates = np.array([0.01, 0.05, 0.1, 0.2, 0.35, 0.5])
  for n in (4, 5, 6, 8, 20):
    counts = np.arange(n + 1)
    chance = stats.binom.pmf(counts, n, rates[:, None])  # [rates, counts]
    p = np.empty((n + 1, n + 1))
    for hits, other in itertools.combinations_with_replacement(counts, 2):
      hits, other = int(hits), int(other)
      p[hits, other] = p[other, hits] = statistics.fisher(hits, n, other, n)
    level = np.einsum('ri,rj,ij->r', chance, chance, (p < ALPHA).astype(float))
    assert (level <= ALPHA).all()
    shares = [statistics.proportion(int(hits), n).value for hits in counts]
    np.testing.assert_allclose(chance @ shares, rates)
  for table in ((3, 8, 0, 8), (4, 5, 1, 7), (0, 4, 4, 4)):
    hits, n, other, other_n = table
    want = stats.fisher_exact([[hits, n - hits], [other, other_n - other]])
    assert statistics.fisher(*table) == pytest.approx(want.pvalue)
  assert statistics.fisher(4, 4, 0, 4) == pytest.approx(2 / 70)


def test_log_ratio_covers_the_geometric_mean_ratio():
  rng = np.random.default_rng(0)
  below = np.exp(rng.normal(size=(1000, 5)))
  above = 1.7 * below * np.exp(0.4 * rng.normal(size=(1000, 5)))
  found = np.array(
    [statistics.log_ratio(*both) for both in zip(above, below, strict=True)]
  )
  covered = (found[:, 1] <= 1.7) & (found[:, 2] >= 1.7)
  assert 0.93 <= covered.mean() <= 0.97
  np.testing.assert_allclose(found[:, 0], stats.gmean(above / below, axis=1))
  one = statistics.log_ratio([3.0], [2.0])
  assert one.value == pytest.approx(1.5)
  assert np.isnan(one[1:]).all()
  infinite = statistics.log_ratio([math.inf, 2.0], [1.0, 1.0])
  assert infinite.value == math.inf
  assert np.isnan(infinite[1:]).all()
  assert np.isnan(statistics.log_ratio([0.0, 2.0], [1.0, 1.0])[1:]).all()
  wide = statistics.log_ratio([1e300, 2.0], [1.0, 1.0])
  assert (wide.low, wide.high) == (0, math.inf)


def test_geometric_mean():
  assert statistics.geometric_mean([2.0, 8.0]) == pytest.approx(4)
  assert statistics.geometric_mean([2.0, math.inf]) == math.inf
  assert statistics.geometric_mean([2.0, 0.0]) == 0
  assert statistics.geometric_mean([1e300] * 3) == pytest.approx(1e300)


@pytest.mark.parametrize('n', [4, 7])
def test_units_signs_and_order_change_nothing_else(n):
  rng = np.random.default_rng(n)
  swapped = {'lower': 'higher', 'higher': 'lower'}
  for shift in (0.0, 0.3, 3.0):
    d = rng.normal(shift, 1, n)
    base = statistics.paired(d, margin=0.5)
    scaled = statistics.paired(100 * d, margin=50.0)
    for name in ('mean', 'sd', 'low', 'high', 'mde'):
      assert getattr(scaled, name) == pytest.approx(100 * getattr(base, name))
    for name in ('p', 'p_sign_flip', 'p_equivalence', 'num_below'):
      assert getattr(scaled, name) == pytest.approx(getattr(base, name))
    (text,) = verdicts(contrast(d))
    (flipped,) = verdicts(contrast(-d))
    word, _, others = text.partition(' ')
    assert flipped == f'{swapped.get(word, word)} {others}'
    assert verdicts(contrast(d[rng.permutation(n)])) == [text]

    left = rng.normal(3, 1, n)
    for move in (0.0, 1.0, -2.5):
      given = rows({'mhc': left + d + move, 'residual': left + move})
      given = [given[i] for i in rng.permutation(len(given))]
      made = collected(given)
      assert verdicts(made) == [text]
      assert made.seeds == list(range(n))


def test_each_verdict_has_its_words():
  calm = np.array([-1, 1, -1, 1, 0]) * 1e-3
  tight = {'kind': 'mhc', 'other': 'hc'}
  assert verdicts(
    contrast(calm - 0.05),
    contrast(calm + 0.05),
    contrast(calm - 0.005),
    contrast(calm),
    contrast(calm * 100, num_contrasts=5),
    contrast(calm[:3]),
    contrast([*calm, math.inf, math.nan]),
    contrast(calm, cosine=0.995, **tight),
  ) == [
    'lower by 0.0500 [0.0488, 0.0512]',
    'higher by 0.0500 [0.0488, 0.0512]',
    'lower by 0.0050 [0.0038, 0.0062], within the margin of 0.01',
    'equivalent within 0.01',
    f'not resolved (could have seen {statistics.mde(0.1, 5, 5):.4f})',
    'not tested (fewer than 4 seeds)',
    'not tested (2 of 7 losses are not finite)',
    'not tested (streams equal: cosine 0.9950)',
  ]
  # Equal streams say nothing against a single stream's residual.
  assert verdicts(contrast(calm, cosine=0.995)) == ['equivalent within 0.01']
  # Together they are held to more than alone.
  third = contrast(0.1 + np.array([-1, 1, -1, 1, 0]) * 0.07)
  assert differs(verdicts(third)[0])
  assert ALPHA / 3 < third.found.p < ALPHA
  zero = contrast(calm * 100)
  assert not any(map(differs, verdicts(third, zero, zero)))
