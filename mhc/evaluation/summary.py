"""The table of what benchmarks have found: values, errors, what guessing gives.

A value is at chance if it is within two standard errors of what a guesser has:
the larger of the estimated error and the guesser's own, sqrt(c (1 - c) / n),
since the estimate is 0 where all answers are alike. Of runs at chance none is
said to be better than another.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from mhc.runtime import files
from mhc.runtime import paths

# Parts of documents that are right; a guesser has one in so many choices, and
# none of free text.
CHOSEN = ('acc', 'acc_norm', 'acc_bytes')
WRITTEN = ('exact_match', 'em', 'f1', 'math_verify')


@dataclasses.dataclass(frozen=True)
class Row:
  """One metric of a task.

  Attributes:
    run: whose it is.
    task: a task, or a group of them.
    metric: with its filter after a comma, if it has one.
    documents: how many the value is of.
    value: the mean over them.
    standard_error: nan where the harness gives none.
    chance: what guessing gives; None where that means nothing.
  """

  run: str
  task: str
  metric: str
  documents: int
  value: float
  standard_error: float
  chance: float | None

  @property
  def verdict(self) -> str:
    """'at chance', 'above chance', 'below chance'; '' without a chance."""
    if self.chance is None:
      return ''
    guessed = math.sqrt(self.chance * (1 - self.chance) / self.documents)
    error = max(guessed, self.standard_error)  # the first, if that is nan
    if abs(self.value - self.chance) <= 2 * error:
      return 'at chance'
    return 'above chance' if self.value > self.chance else 'below chance'


def rows(run: str, results: Mapping[str, Any]) -> list[Row]:
  """The rows of what `lm_eval.simple_evaluate` returns, samples included."""
  choices = {
    task: _mean_chance(samples)
    for task, samples in results['samples'].items()
    if results['configs'][task]['output_type'] == 'multiple_choice'
  }
  found = []
  for task, values in {
    **results['results'],
    **results.get('groups', {}),
  }.items():
    parts = _tasks(task, results)
    sizes = [results['n-samples'][part]['effective'] for part in parts]
    for name, value in values.items():
      metric, _, chosen = name.partition(',')
      if not chosen or metric.endswith('_stderr'):
        continue
      if not isinstance(value, int | float):
        continue
      error = values.get(f'{metric}_stderr,{chosen}')
      is_known = isinstance(error, int | float)
      found.append(
        Row(
          run,
          task,
          metric if chosen == 'none' else f'{metric}, {chosen}',
          sum(sizes),
          float(value),
          float(error) if is_known else math.nan,
          _chance(metric, parts, sizes, choices),
        )
      )
  return found


def best(found: Sequence[Row]) -> list[tuple[str, str, str]]:
  """Task, metric and, of several runs, what can be said of the best one.

  A run is the best if it is above chance and above each other one by more than
  two standard errors of the difference, as if the runs were independent.
  """
  groups = {}
  for row in found:
    if row.chance is not None:
      groups.setdefault((row.task, row.metric), []).append(row)
  said = []
  for (task, metric), mine in groups.items():
    first, *others = sorted(mine, key=lambda row: -row.value)
    if not others:
      continue
    words = f'{first.run} is the best'
    if first.verdict != 'above chance':
      words = 'no ranking: at chance'
    elif not all(_is_above(first, other) for other in others):
      words = 'no ranking: not resolved'
    said.append((task, metric, words))
  return said


def write(
  out: paths.Path,
  found: Sequence[Row],
  records: Mapping[str, Mapping[str, Any]],
  limit: int | None,
):
  """Writes results.json and table.md into a folder, which it makes.

  Args:
    out: the folder.
    found: the rows.
    records: of each run, what `Scorer.record` has returned.
    limit: documents that a task was limited to.
  """
  out.mkdir(parents=True, exist_ok=True)
  values = {'limit': limit, 'runs': dict(records), 'rows': jsonable(found)}
  text = json.dumps(values, indent=2, allow_nan=False)
  files.replace(out / 'results.json', text + '\n')
  files.replace(out / 'table.md', markdown(found, records))


def jsonable(found: Sequence[Row]) -> list[dict[str, Any]]:
  """The rows for a JSON file, null for nan."""
  return [
    {
      name: None if value != value else value
      for name, value in dataclasses.asdict(row).items()
    }
    | {'verdict': row.verdict}
    for row in found
  ]


def markdown(
  found: Sequence[Row], records: Mapping[str, Mapping[str, Any]]
) -> str:
  """The rows as a table; the best of several runs; what was done."""
  lines = [
    '| run | task | metric | documents | value | standard error | chance | |',
    '|---|---|---|---:|---:|---:|---:|---|',
  ]
  for row in found:
    error, chance = (
      '' if number is None or number != number else f'{number:.4f}'
      for number in (row.standard_error, row.chance)
    )
    lines.append(
      f'| {row.run} | {row.task} | {row.metric} | {row.documents} | '
      f'{row.value:.4f} | {error} | {chance} | {row.verdict} |'
    )
  if ranked := best(found):
    lines += ['', '| task | metric | of the runs |', '|---|---|---|']
    lines += [f'| {" | ".join(three)} |' for three in ranked]
  for run, of in records.items():
    rate = of['requests'] / max(of['seconds'], 1e-9)
    lines += [
      '',
      f'{run}: {of["requests"]:,} requests in {of["seconds"]:.1f} s with '
      f'compilation, {rate:.0f} a second.',
    ]
    cut = of['truncated']
    if any(cut.values()):
      lines[-1] += (
        f' {cut["requests"]:,} contexts lost {cut["tokens"]:,} tokens at their '
        f'left, {cut["limited"]:,} continuations had less room than asked for.'
      )
  return '\n'.join([*lines, ''])


def _is_above(one, other):
  # Both have the error of a guesser at least: an estimate may be 0.
  errors = [
    max(
      math.sqrt(row.chance * (1 - row.chance) / row.documents),
      row.standard_error,
    )
    for row in (one, other)
  ]
  return one.value - other.value > 2 * math.hypot(*errors)


def _tasks(name, results) -> list[str]:
  """The tasks in a group; of a task, itself."""
  parts = results.get('group_subtasks', {}).get(name) or []
  return [task for part in parts for task in _tasks(part, results)] or [name]


def _mean_chance(samples) -> float:
  """1 / the number of choices, in the mean over documents."""
  # For this metric each choice is asked for without its context, too.
  counts = {
    sample['doc_id']: len(sample['arguments'])
    // (2 if 'acc_mutual_info' in sample['metrics'] else 1)
    for sample in samples
  }
  return sum(1 / count for count in counts.values()) / len(counts)


def _chance(metric, parts, sizes, choices) -> float | None:
  """The mean over the documents of a group's tasks."""
  if metric in CHOSEN and all(part in choices for part in parts):
    total = sum(
      size * choices[part] for size, part in zip(sizes, parts, strict=True)
    )
    return total / sum(sizes)
  is_written = metric in WRITTEN and not any(part in choices for part in parts)
  return 0.0 if is_written else None
