"""The verdict on each contrast: which of two designs has the lower loss.

A contrast pairs the runs of two kinds by their seed. Its verdict is one of

    lower by a [lo, hi]               Holm's p < 0.05; the 95 % interval
    higher by a [lo, hi]
    equivalent within m               both one-sided tests reject more than m
    not resolved (could have seen x)  x is the minimum detectable effect
    not tested (reason)               the runs cannot answer

and nothing else: a mean below zero is not a difference.
"""

from collections.abc import Iterator, Sequence
import math
from typing import NamedTuple

import numpy as np

from mhc.experiments import statistics

# Fewer seeds are not tested: the t quantile of two is 12.7.
MIN_SEEDS = 4
# Streams whose median cosine is above it are one stream for most of the depth.
EQUAL_STREAMS = 0.99
MARGIN = 0.01
DEFAULT = (('mhc', 'residual'), ('mhc', 'identity'), ('mhc', 'hc'))


class Contrast(NamedTuple):
  """Losses of `kind` minus losses of `other`, nats a token, by seed."""

  kind: str
  other: str
  seeds: tuple[int, ...]
  differences: tuple[float, ...]
  margin: float
  # Median over seeds, of the mixing kind with the more equal streams; None if
  # neither mixes.
  cosine: float | None
  found: statistics.Paired | None  # None for fewer than two finite differences


class Judged(NamedTuple):
  """A contrast, and its verdict among those declared with it."""

  contrast: Contrast
  p: float | None  # Holm's
  p_equivalence: float | None
  verdict: str


def pair(
  rows: Sequence[dict],
  kind: str,
  other: str,
  *,
  margin: float = MARGIN,
  num_contrasts: int = 1,
) -> Contrast | None:
  """The contrast of two kinds among rows of one setting; None without pairs."""
  by_kind = {
    name: {row['seed']: row for row in rows if row['variant'] == name}
    for name in (kind, other)
  }
  seeds = sorted(by_kind[kind].keys() & by_kind[other].keys())
  if not seeds:
    return None
  differences = tuple(
    by_kind[kind][seed]['heldout_nats'] - by_kind[other][seed]['heldout_nats']
    for seed in seeds
  )
  found = None
  if len(seeds) > 1 and all(map(math.isfinite, differences)):
    found = statistics.paired(
      differences, margin=margin, num_contrasts=num_contrasts
    )
  cosines = [_cosine(by_kind[name]) for name in (kind, other)]
  cosine = max((c for c in cosines if c is not None), default=None)
  return Contrast(kind, other, tuple(seeds), differences, margin, cosine, found)


def _cosine(by_seed):
  cosines = [
    row['stream_cosine']
    for row in by_seed.values()
    if row['stream_cosine'] is not None and row['kind'] != 'identity'
  ]
  return float(np.median(cosines)) if cosines else None


def judge(contrasts: Sequence[Contrast]) -> list[Judged]:
  """Verdicts on contrasts that were declared together."""
  tested = [c for c in contrasts if c.found and not _reason(c)]
  p = iter(statistics.holm([c.found.p for c in tested]))
  same = iter(statistics.holm([c.found.p_equivalence for c in tested]))
  judged = []
  for contrast in contrasts:
    if _reason(contrast):
      text = f'not tested ({_reason(contrast)})'
      judged.append(Judged(contrast, None, None, text))
    else:
      both = next(p), next(same)
      judged.append(Judged(contrast, *both, _verdict(contrast, *both)))
  return judged


def _reason(contrast) -> str:
  """Why a contrast is not tested; '' for one that is."""
  bad = [d for d in contrast.differences if not math.isfinite(d)]
  if bad:
    return f'{len(bad)} of {len(contrast.seeds)} losses are not finite'
  if len(contrast.seeds) < MIN_SEEDS:
    return f'fewer than {MIN_SEEDS} seeds'
  both_wide = 'residual' not in (contrast.kind, contrast.other)
  if both_wide and (contrast.cosine or 0) > EQUAL_STREAMS:
    return f'streams equal: cosine {contrast.cosine:.4f}'
  return ''


def _verdict(contrast, p, p_equivalence) -> str:
  found, margin = contrast.found, contrast.margin
  if p < statistics.ALPHA:
    word, sign = ('lower', -1) if found.mean < 0 else ('higher', 1)
    low, high = sorted((sign * found.low, sign * found.high))
    text = f'{word} by {sign * found.mean:.4f} [{low:.4f}, {high:.4f}]'
    if p_equivalence < statistics.ALPHA:
      text += f', within the margin of {margin:g}'
    return text
  if p_equivalence < statistics.ALPHA:
    return f'equivalent within {margin:g}'
  return f'not resolved (could have seen {found.mde:.4f})'


def of_kinds(rows: Sequence[dict]) -> Iterator[Contrast]:
  """The default contrasts that rows of one setting have both kinds of."""
  kinds = {row['variant'] for row in rows}
  known = [pair for pair in DEFAULT if kinds.issuperset(pair)]
  for kind, other in known:
    found = pair(rows, kind, other, num_contrasts=len(known))
    if found is not None:
      yield found
