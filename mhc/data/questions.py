"""Rows of questions, made as they are read, of several levels of difficulty.

A row is a function of its side and its number alone. It is the bytes of its
questions, each level of difficulty in turn, after a line's end:

    hops          ACCBBA2AB    a random cycle as pairs (from, to), then how many
                               steps, from where, and where they lead
    permutations  "! &         elements of S_n, applied from left to right, and
                               their product
    brackets      ([]( )])     a start of brackets, and what closes it
    copy          ABC ABC
    recall        KVLW LWKV    pairs (key, value), then each key and its value

The bytes of answers alone are predicted: the others are kept as ~byte, which is
negative.
"""

from collections.abc import Callable, Iterator
import functools
import hashlib
import itertools
from typing import NamedTuple

from jaxtyping import Int32
import numpy as np

from mhc.config.task import TaskConfig

# Rows of each side: more than a run trains on, and those held out.
NUM_TRAIN, NUM_HELDOUT = 2**30, 4096
SIDES = {'train': 0, 'heldout': 1}
END = b'\n'
BETWEEN = np.array([~END[0]], np.int32)
# Of which letters are made; none is a digit, which says how many hops.
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123)) + b'!#$%&()*+,-.'
OPENING, CLOSING = b'([{<', b')]}>'
# The first element of a group of permutations: after it there is no space.
FIRST_ELEMENT = 33
# To be raised when a row changes: then it is another text.
VERSION = 1


class Question(NamedTuple):
  """What stands before an answer, the answer, and its difficulty."""

  prompt: bytes
  answer: bytes
  level: int


def questions(task: TaskConfig, rng: np.random.Generator) -> Iterator[Question]:
  """The questions of a row, one after the other."""
  ladder = itertools.chain.from_iterable([task.ladder] * task.repeats)
  yield from _TASKS[task.name](task, rng, ladder)


def _hops(task, rng, ladder):
  size = task.symbols
  cycle = rng.permutation(size)
  shown = rng.permutation(size)
  pairs = np.stack([cycle[shown], cycle[(shown + 1) % size]], axis=1)
  before = _letters(pairs.reshape(-1))
  for level in ladder:
    start = rng.integers(size)
    ends = cycle[[start, (start + level) % size]]
    first, last = _letters(ends[:1]), _letters(ends[1:])
    yield Question(before + b'%d' % level + first, last, level)
    before = b''


def _permutations(task, rng, ladder):
  elements, table = _group(task.symbols)
  before = b''
  for level in ladder:
    word = rng.integers(len(elements), size=level).tolist()
    product = functools.reduce(lambda a, b: table[a][b], word)
    prompt = bytes(FIRST_ELEMENT + element for element in word)
    yield Question(
      before + prompt + b' ', bytes([FIRST_ELEMENT + product]), level
    )
    before = END


@functools.cache
def _group(size):
  """The permutations of so many, and the number of each product `a then b`."""
  elements = [*itertools.permutations(range(size))]
  numbers = {element: index for index, element in enumerate(elements)}
  table = [
    [numbers[tuple(b[i] for i in a)] for b in elements] for a in elements
  ]
  return elements, table


def _brackets(task, rng, ladder):
  before = b''
  for level in ladder:
    prompt, open_ = bytearray(), []
    for opens in _walk(rng, level, task.ladder[-1]):
      if opens:
        open_.append(int(rng.integers(task.symbols)))
        prompt.append(OPENING[open_[-1]])
      else:
        prompt.append(CLOSING[open_.pop()])
    answer = bytes(CLOSING[kind] for kind in reversed(open_))
    yield Question(before + bytes(prompt) + b' ', answer, level)
    before = END


def _walk(rng, level, closed):
  """Random opens (and closes), never below 0: `closed` closes, ends at level.

  All such walks are equally likely: others are drawn again.
  """
  steps = np.repeat([1, -1], [closed + level, closed])
  while np.cumsum(rng.permuted(steps, out=steps)).min() < 0:
    pass
  return steps > 0


def _copy(task, rng, ladder):
  before = b''
  for level in ladder:
    word = _letters(rng.integers(task.symbols, size=level))
    yield Question(before + word + b' ', word, level)
    before = END


def _recall(task, rng, ladder):
  before = b''
  for level in ladder:
    keys = rng.permutation(task.symbols)[:level]
    values = rng.integers(task.symbols, size=level)
    before += _letters(np.stack([keys, values], axis=1).reshape(-1)) + b' '
    for index in rng.permutation(level).tolist():
      key, value = (_letters(x[index : index + 1]) for x in (keys, values))
      yield Question(before + key, value, level)
      before = b''
    before = END


def _letters(numbers) -> bytes:
  return bytes(LETTERS[number] for number in numbers.tolist())


_TASKS: dict[str, Callable] = {
  'hops': _hops,
  'permutations': _permutations,
  'brackets': _brackets,
  'copy': _copy,
  'recall': _recall,
}


class Rows:
  """A stream of rows of `seq_len` tokens, as if it was one text.

  Each begins and is filled up with ends of lines, so that a row and the first
  token of the next are what `rows` reads.
  """

  def __init__(self, task: TaskConfig, side: str, seq_len: int):
    self._task, self._side, self._seq_len = task, side, seq_len
    self._number = {'train': NUM_TRAIN, 'heldout': NUM_HELDOUT}[side]

  def __len__(self) -> int:
    return self._number * self._seq_len + 1

  def __getitem__(self, place: slice) -> Int32[np.ndarray, 'tokens']:
    start, stop, _ = place.indices(len(self))
    first = start // self._seq_len
    rows = range(first, -(-(stop - 1) // self._seq_len))
    tokens = np.concatenate([*map(self.row, rows), BETWEEN])
    return tokens[start - first * self._seq_len :][: stop - start]

  def row(self, index: int) -> Int32[np.ndarray, 'seq_len']:
    rng = np.random.default_rng((SIDES[self._side], index))
    tokens = np.full(self._seq_len, ~END[0], np.int32)
    place = 1
    for question in questions(self._task, rng):
      for text, scored in ((question.prompt, False), (question.answer, True)):
        values = np.frombuffer(text, np.uint8).astype(np.int32)
        tokens[place : place + len(text)] = values if scored else ~values
        place += len(text)
    return tokens

  def __repr__(self) -> str:
    return f'task {self._task.name}'


def levels(task: TaskConfig) -> list[tuple[int, slice]]:
  """The level of every question of a row, and the targets that answer it."""
  found, place = [], 0
  for question in questions(task, np.random.default_rng(0)):
    place += len(question.prompt)
    # The first target is the first byte after the line's end.
    found.append((question.level, slice(place, place + len(question.answer))))
    place += len(question.answer)
  return found


def sha256(task: TaskConfig, seq_len: int) -> str:
  """The digest of a task, as if it was of its text."""
  what = (VERSION, task.name, task.ladder, task.symbols, task.repeats, seq_len)
  return hashlib.sha256(repr(what).encode()).hexdigest()
