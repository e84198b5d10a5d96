"""The verdict on each contrast: which of two designs has the lower loss.

A contrast pairs the runs of two designs by their seed, at one setting of a
panel's axes. Those that the panel has declared before training get one of

    lower by a [lo, hi]               Holm's p < 0.05; the 95 % interval
    higher by a [lo, hi]
    equivalent within m               both one-sided tests reject more than m
    not resolved (could have seen x)  x is the minimum detectable effect
    not tested (reason)               the runs cannot answer

and nothing else: a mean below zero is not a difference. Holm's correction is
over all contrasts of a report that were declared and can be tested. The others
are estimates: they have intervals and no verdict.
"""

from collections.abc import Iterator, Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from mhc.config import comparison as comparison_lib
from mhc.experiments import statistics
from mhc.experiments import tuning

# Fewer seeds are not tested: the t quantile of two is 12.7.
MIN_SEEDS = 4
# Streams whose median cosine is above it are one stream for most of the depth.
EQUAL_STREAMS = 0.99
Choices = Mapping[str, tuning.Choice]


class Contrast(NamedTuple):
  """Losses of `kind` minus losses of `other`, nats a token, by seed."""

  panel: str
  setting: dict[str, Any]
  kind: str
  other: str
  declared: bool
  seeds: list[int]
  differences: list[float]
  margin: float
  # Median over seeds, of the mixing design with the more equal streams; None if
  # neither mixes.
  cosine: float | None
  found: statistics.Paired | None  # None for fewer than two finite differences
  # The mean's interval for other text as well; None without the losses by part.
  crossed: statistics.Interval | None
  reason: str  # why it is not tested; '' if it is


class Judged(NamedTuple):
  """A contrast, and its verdict among those declared with it."""

  contrast: Contrast
  p: float | None  # Holm's
  p_equivalence: float | None
  verdict: str  # '' for one that was not declared


def collect(
  comparison: comparison_lib.Comparison,
  rows: Sequence[dict],
  choices: Mapping[str, Choices] | None = None,
) -> list[Contrast]:
  """The contrasts of all panels that have pairs among `rows`.

  `choices` are the tuned rates by tuning panel.
  """
  choices = choices or {}
  return [
    contrast
    for name, panel in comparison.panels.items()
    for contrast in _of_panel(
      comparison,
      name,
      [row for row in rows if row['panel'] == name],
      choices.get(panel.tuned_on, {}),
    )
  ]


def _of_panel(comparison, name, rows, choices) -> Iterator[Contrast]:
  panel, seen = comparison.panels[name], set()
  if panel.role == 'tune':
    return
  for setting in comparison.settings(name):
    here = comparison_lib.rows_at(rows, setting)
    for pair in panel.described:
      sides = [
        {row['seed']: row for row in here if row['variant'] == design}
        for design in pair
      ]
      seeds = sorted(sides[0].keys() & sides[1].keys())
      runs = tuple(id(side[seed]) for side in sides for seed in seeds)
      if seeds and runs not in seen:
        seen.add(runs)
        common = dict(panel=name, setting=dict(setting))
        common |= dict(kind=pair[0], other=pair[1], margin=panel.margin)
        common |= dict(declared=pair in panel.declared, seeds=seeds)
        yield _contrast(common, sides, choices)


def _contrast(common, sides, choices) -> Contrast:
  pairs = [tuple(side[seed] for side in sides) for seed in common['seeds']]
  differences = [
    one['heldout_nats'] - other['heldout_nats'] for one, other in pairs
  ]
  found = crossed = None
  if len(pairs) > 1 and all(map(math.isfinite, differences)):
    found = statistics.paired(differences, margin=common['margin'])
    blocks = [[row['heldout_blocks'] for row in pair] for pair in pairs]
    if all(all(one) for one in blocks):
      parts = np.array(blocks)
      crossed = statistics.crossed(parts[:, 0] - parts[:, 1])
  cosines = [_cosine(side) for side in sides]
  cosine = max((c for c in cosines if c is not None), default=None)
  contrast = Contrast(
    **common,
    differences=differences,
    cosine=cosine,
    found=found,
    crossed=crossed,
    reason='',
  )
  return contrast._replace(reason=_reason(contrast, pairs, choices))


def _cosine(by_seed):
  cosines = [
    row['stream_cosine']
    for row in by_seed.values()
    if row['stream_cosine'] is not None and row['kind'] != 'identity'
  ]
  return float(np.median(cosines)) if cosines else None


def _reason(contrast, pairs, choices) -> str:
  bad = sum(not math.isfinite(d) for d in contrast.differences)
  if bad:
    return f'{bad} of {len(contrast.seeds)} losses are not finite'
  if len(contrast.seeds) < MIN_SEEDS:
    return f'fewer than {MIN_SEEDS} seeds'
  for design in (contrast.kind, contrast.other):
    choice = choices.get(comparison_lib.rate_of(design))
    if choice and choice.at_edge:
      return f'best rate of {design} at the edge: {choice.rate:g}'
  both_wide = all(row['kind'] != 'residual' for row in pairs[0])
  if both_wide and (contrast.cosine or 0) > EQUAL_STREAMS:
    return f'streams equal: cosine {contrast.cosine:.4f}'
  return ''


def judge(contrasts: Sequence[Contrast]) -> list[Judged]:
  """Verdicts on the declared ones; the others stay as they are."""
  tested = [c for c in contrasts if c.declared and not c.reason]
  contrasts = [_seen_among(contrast, len(tested)) for contrast in contrasts]
  p = iter(statistics.holm([c.found.p for c in tested]))
  same = iter(statistics.holm([c.found.p_equivalence for c in tested]))
  judged = []
  for contrast in contrasts:
    if not contrast.declared:
      judged.append(Judged(contrast, None, None, ''))
    elif contrast.reason:
      text = f'not tested ({contrast.reason})'
      judged.append(Judged(contrast, None, None, text))
    else:
      both = next(p), next(same)
      judged.append(Judged(contrast, *both, _verdict(contrast, *both)))
  return judged


def _seen_among(contrast, number) -> Contrast:
  """The contrast with what it could see when `number` are tested."""
  if contrast.found is None:
    return contrast
  sd, n = contrast.found.sd, contrast.found.n
  mde = statistics.mde(sd, n, max(1, number))
  return contrast._replace(found=contrast.found._replace(mde=mde))


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


def as_dict(judged: Judged) -> dict[str, Any]:
  """A contrast as it stands in results.json."""
  contrast = judged.contrast
  values = contrast._asdict()
  found, crossed = values.pop('found'), values.pop('crossed')
  names = statistics.Paired._fields
  values |= found._asdict() if found else dict.fromkeys(names)
  values['crossed'] = crossed and [crossed.low, crossed.high]
  return values | {
    'p_holm': judged.p,
    'p_equivalence_holm': judged.p_equivalence,
    'verdict': judged.verdict,
  }
