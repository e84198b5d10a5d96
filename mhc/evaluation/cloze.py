"""Which line comes next in a function? The true one, or others of its file.

An item is the beginning of a function of held-out Python text, the line that
follows, and CHOICES - 1 other lines of the same file with the indentation of
the true one: what tells them apart is what the text is about. A model chooses
by log-likelihood, as in multiple choice: `acc` of the line, `acc_norm` of its
bytes on average. Models of the same text are compared item by item.
"""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple
import warnings

import numpy as np
from scipy import special

from mhc import config as config_lib
from mhc.data import corpus as corpus_lib
from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.evaluation import scoring
from mhc.evaluation import summary
from mhc.runtime import paths

TASK = 'cloze'
CHOICES = 4
# Lines of a function before the one that is asked for, at least.
BEFORE = 2
# Bytes of a line that says enough.
SHORTEST = 10


class Item(NamedTuple):
  """A question: the document it is of, what stands before, and the lines."""

  name: str
  context: bytes
  choices: tuple[bytes, ...]
  right: int


@dataclasses.dataclass(frozen=True)
class Difference:
  """Accuracy of one run minus another's, over the same items."""

  run: str
  other: str
  mean: float
  low: float
  high: float


def heldout_documents(
  data: config_lib.DataConfig, path: str | None = None
) -> list[documents_lib.Document]:
  """The documents that runs on the text of `data`, or at `path`, hold out.

  Raises:
    ValueError: the text is several, tokens or a task, and `path` is not given.
    OSError: it cannot be read.
  """
  if path is None and (
    data.mixture or data.task.name or corpus_lib.is_tokens(data.path)
  ):
    raise ValueError(
      f'data.path={data.path!r}, data.mixture={data.mixture}, '
      f'data.task.name={data.task.name!r}: the run has not one text of '
      'documents to ask about, give such by --path'
    )
  path = paths.given(data.path if path is None else path, '--path')
  found, _ = corpus_lib.documents_at(
    path, corruption.SkipLog(), data.text_field
  )
  return documents_lib.split(found)[1]


def items(
  documents: Sequence[documents_lib.Document], number: int, seed: int = 0
) -> list[Item]:
  """At most `number` items, one a function, in random order.

  Raises:
    ValueError: the documents hold no function of which one can be made.
  """
  rng = np.random.default_rng(seed)
  functions = [one for document in documents for one in _functions(document)]
  found = []
  for index in rng.permutation(len(functions)).tolist():
    if len(found) == number:
      break
    item = _item(*functions[index], rng)
    if item is not None:
      found.append(item)
  if not found:
    raise ValueError(
      f'none of {len(documents)} held-out documents holds a Python function of '
      'a few lines to ask about: give such text by --path'
    )
  return found


def _functions(document):
  """(document, its lines, first, last) of each function in Python text."""
  try:
    with warnings.catch_warnings(action='ignore'):
      tree = ast.parse(document.text)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return
  lines = document.text.splitlines(keepends=True)
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield document, lines, node.lineno - 1, node.end_lineno


def _item(document, lines, first, last, rng) -> Item | None:
  asked = [i for i in range(first + BEFORE, last) if _says_enough(lines[i])]
  if not asked:
    return None
  place = asked[rng.integers(len(asked))]
  line = lines[place]
  own = line.strip()
  others = {
    other.strip()
    for other in (*lines[:first], *lines[last:])
    if _says_enough(other)
  } - {each.strip() for each in lines[first:last]}
  if len(others) < CHOICES - 1:
    return None
  indent = line[: len(line) - len(line.lstrip())]
  wrong = rng.choice(sorted(others), CHOICES - 1, replace=False).tolist()
  right = int(rng.integers(CHOICES))
  texts = [*wrong[:right], own, *wrong[right:]]
  return Item(
    document.name,
    b''.join(lines[first:place]),
    tuple(indent + text + b'\n' for text in texts),
    right,
  )


def _says_enough(line) -> bool:
  text = line.strip()
  return len(text) >= SHORTEST and not text.startswith((b'#', b'"', b"'"))


def answers(
  scorer: scoring.Scorer, asked: Sequence[Item]
) -> dict[str, np.ndarray]:
  """Whether each item is answered right, 1 or 0, by metric."""
  encode = scorer.tokenizer.encode
  requests = [
    ([scorer.tokenizer.start, *encode(item.context).tolist()], encode(choice))
    for item in asked
    for choice in item.choices
  ]
  scores = [score for score, _ in scorer.log_likelihoods(requests)]
  scores = np.array(scores).reshape(-1, CHOICES)
  lengths = np.array([[len(text) for text in i.choices] for i in asked])
  right = np.array([item.right for item in asked])
  return {
    'acc': (scores.argmax(1) == right).astype(np.float64),
    'acc_norm': ((scores / lengths).argmax(1) == right).astype(np.float64),
  }


def rows(run: str, found: Mapping[str, np.ndarray]) -> list[summary.Row]:
  """The lines of a run in the table."""
  return [
    summary.Row(
      run=run,
      task=TASK,
      metric=metric,
      documents=len(right),
      value=float(right.mean()),
      standard_error=_error(right),
      chance=1 / CHOICES,
    )
    for metric, right in found.items()
  ]


def differences(
  found: Mapping[str, Mapping[str, np.ndarray]], metric: str = 'acc_norm'
) -> list[Difference]:
  """Each run against the first, with 95 % intervals by t over the items."""
  (first, base), *others = found.items()
  result = []
  for run, right in others:
    each = right[metric] - base[metric]
    # The quantile of Student's t: items may be few.
    half = float(special.stdtrit(len(each) - 1, 0.975)) * _error(each)
    mean = float(each.mean())
    result.append(Difference(run, first, mean, mean - half, mean + half))
  return result


def _error(values) -> float:
  """The standard error of a mean over items."""
  return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def lines(found: Sequence[Difference]) -> list[str]:
  """What the differences are, for people."""
  return [
    f'{d.run} - {d.other}: {d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] of the '
    'items right by acc_norm, over the same items; one run each, so that it is '
    'of these runs, not of their designs'
    for d in found
  ]
