"""The papers' claims beside what the runs of one setting say of them.

A claim gets the paper's number, ours with its interval, and a verdict in the
words of `contrasts`, or the reason why runs of this size cannot answer.
"""

from collections.abc import Iterator, Sequence
import math
from typing import NamedTuple

from mhc.experiments import contrasts
from mhc.experiments import statistics

NOT_COMPARABLE = 'not comparable at this size'


class Claim(NamedTuple):
  claimed: str
  paper: str
  here: str
  verdict: str


LOSSES = {
  ('mhc', 'residual'): (
    "mHC's final loss against the plain residual's",
    '-0.021 (27B, one run each)',
  ),
  ('hc', 'residual'): (
    "HC's final loss against the plain residual's",
    '-0.027 (Table 1, size not stated)',
  ),
  ('mhc', 'hc'): (
    "mHC's final loss against HC's",
    'benchmarks only: better on 7 of 8 (27B)',
  ),
  ('mhc', 'identity'): (
    'Learned mixing against H_res = I',
    'disputed by later work',
  ),
}


def evaluate(
  rows: Sequence[dict], judged: Sequence[contrasts.Judged]
) -> list[Claim]:
  """The claims that `rows` of one setting, and their contrasts, speak to."""
  by_kind: dict[str, list[dict]] = {}
  for row in rows:
    by_kind.setdefault(row['variant'], []).append(row)
  return [
    *_losses(judged),
    *_gains(by_kind),
    *_stability(by_kind),
    *_cost(by_kind),
  ]


def _losses(judged) -> Iterator[Claim]:
  for contrast, *_, verdict in judged:
    pair = contrast.kind, contrast.other
    if pair in LOSSES:
      yield Claim(*LOSSES[pair], estimate(contrast), verdict)


def estimate(contrast: contrasts.Contrast) -> str:
  """The mean difference with its interval, or the differences themselves."""
  found = contrast.found
  if found is None:
    return ' / '.join(f'{d:+.4f}' for d in contrast.differences)
  return (
    f'{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] nats a token, '
    f'below 0 in {found.num_below} of {found.n} seeds'
  )


def _gains(by_kind) -> Iterator[Claim]:
  gains = {k: [row['gain_max'] for row in rows] for k, rows in by_kind.items()}
  if 'hc' in gains and 'mhc' in gains:
    seeds = _common(by_kind['hc'], by_kind['mhc'])
    ratio = statistics.log_ratio(
      *([row['gain_max'] for row in pick] for pick in seeds)
    )
    yield Claim(
      "HC's composite gain against mHC's, the larger of forward and backward",
      'about 3000 against 1.6 (27B)',
      f'{_per_seed(gains["hc"])} against {_per_seed(gains["mhc"])}, by seed',
      _factor(ratio, len(seeds[0])),
    )
  if 'mhc' in gains:
    yield Claim(
      "mHC's composite gain",
      'about 1.6 (27B), a column sum; the rows sum to 1 by construction',
      f'{_per_seed(gains["mhc"])}, by seed',
      f'geometric mean {number(statistics.geometric_mean(gains["mhc"]))}',
    )


def _common(rows, others):
  """The rows of both kinds of the seeds that both have."""
  seeds = {r['seed'] for r in rows} & {r['seed'] for r in others}
  return [
    sorted((r for r in one if r['seed'] in seeds), key=lambda r: r['seed'])
    for one in (rows, others)
  ]


def _factor(ratio, seeds) -> str:
  if seeds < contrasts.MIN_SEEDS:
    return f'not tested (fewer than {contrasts.MIN_SEEDS} seeds)'
  if math.isnan(ratio.low):
    return 'not tested (a gain is not finite)'
  interval = f'{number(ratio.value)} [{number(ratio.low)}, '
  interval += f'{number(ratio.high)}]'
  if ratio.low > 1 or ratio.high < 1:
    return f'{"higher" if ratio.low > 1 else "lower"} by a factor of {interval}'
  return f'not resolved (factor {interval})'


def _stability(by_kind) -> Iterator[Claim]:
  if 'hc' not in by_kind or 'mhc' not in by_kind:
    return
  hc, mhc = by_kind['hc'], by_kind['mhc']
  yield Claim(
    "HC's gradient norm after warm-up, against mHC's",
    'unstable against quiet (27B)',
    'coefficient of variation over steps, by seed: HC '
    f'{_per_seed([r["grad_norm_cv"] for r in hc])}, mHC '
    f'{_per_seed([r["grad_norm_cv"] for r in mhc])}',
    _factor(
      statistics.log_ratio(
        *([r['grad_norm_cv'] for r in pick] for pick in _common(hc, mhc))
      ),
      len(_common(hc, mhc)[0]),
    ),
  )
  hits = [sum(r['loss_spikes'] > 0 for r in rows) for rows in (hc, mhc)]
  yield Claim(
    "Runs whose loss spikes: HC's, against mHC's",
    'one surge, near step 12,000, against none (27B, one run each)',
    f'HC {share(hits[0], len(hc))}, mHC {share(hits[1], len(mhc))}',
    _spikes(hits[0], len(hc), hits[1], len(mhc)),
  )


def share(hits: int, n: int) -> str:
  """'k of n [low, high]', the interval of Clopper and Pearson in per cent."""
  found = statistics.proportion(hits, n)
  return f'{hits} of {n} [{found.low:.0%}, {found.high:.0%}]'


def _spikes(hits, n, other_hits, other_n) -> str:
  if min(n, other_n) < contrasts.MIN_SEEDS:
    return f'not tested (fewer than {contrasts.MIN_SEEDS} seeds)'
  p = statistics.fisher(hits, n, other_hits, other_n)
  if p < statistics.ALPHA:
    word = 'more' if hits / n > other_hits / other_n else 'fewer'
    return f"{word} often (Fisher's p {p:.3f})"
  return f"not resolved (Fisher's p {p:.2f})"


def _cost(by_kind) -> Iterator[Claim]:
  ratios = [
    r['step_time_ratio'] for r in by_kind.get('mhc', []) if r['step_time_ratio']
  ]
  if ratios:
    yield Claim(
      "mHC's time a step against the plain residual's",
      '+6.7 % with fused kernels (27B, in-house machines)',
      f'{_per_seed(ratios)} times, by seed, on this machine, at a width where '
      'the connections are a large part of the work',
      NOT_COMPARABLE,
    )


def _per_seed(values) -> str:
  return ' / '.join(map(number, values))


def number(value: float) -> str:
  """Formats three significant digits, without an exponent where it is short."""
  if not math.isfinite(value):
    return 'not finite'
  if 1e-3 <= abs(value) < 1e5:
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f'{value:,.{digits}f}'
  return f'{value:.2g}'
