"""The settings of tasks whose rows are made: mhc/data/questions.py."""

import dataclasses
import math
from typing import Literal, NamedTuple

from mhc.config import checks

# Metrics accuracy/LEVEL: the share of right answers.
ACCURACY = 'accuracy'


class Limits(NamedTuple):
  """What a task takes: its defaults, and the largest of each."""

  levels: tuple[int, ...]
  size: int
  questions: int
  most_level: int
  sizes: tuple[int, int]


TASKS = {
  'hops': Limits((1, 2, 3, 4), 16, 4, 9, (2, 64)),
  'permutations': Limits((2, 4, 8, 16), 3, 2, 256, (2, 5)),
  'brackets': Limits((1, 2, 4, 8), 2, 2, 64, (1, 4)),
  'copy': Limits((4, 8, 16), 26, 1, 256, (2, 64)),
  'recall': Limits((4, 8, 16), 26, 1, 64, (2, 64)),
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """A task with levels of difficulty, in place of text."""

  # '' for text. 'hops': follow a random cycle as many steps as the level says;
  # 'permutations': the product of as many; 'brackets': close as many; 'copy' as
  # many letters; 'recall': the values of as many keys.
  name: Literal['', 'hops', 'permutations', 'brackets', 'copy', 'recall'] = ''
  # Levels of difficulty, () for the task's own.
  levels: tuple[int, ...] = ()
  # Length of the cycle, numbers that are permuted, kinds of brackets, letters;
  # 0 for the task's own.
  size: int = 0
  # Questions of each level in a row (lists of them for 'recall'), 0 for the
  # task's own.
  questions: int = 0

  def __post_init__(self):
    checks.check_types(self)
    if not self.name:
      checks.are_default(self, "name=''", {'name'})
      return
    limits = TASKS[self.name]
    checks.not_negative(self, 'questions')
    low, high = limits.sizes
    if self.size and not low <= self.size <= high:
      raise ValueError(
        f'task.size={self.size} of task.name={self.name!r} must be in '
        f'[{low}, {high}]'
      )
    ladder = self.ladder
    most = limits.most_level
    if self.name == 'hops':
      # Further on, the cycle is where it began.
      most = min(most, self.symbols - 1)
    if self.name == 'recall':
      most = min(most, self.symbols)
    if [*ladder] != sorted({*ladder}) or ladder[0] < 1 or ladder[-1] > most:
      raise ValueError(
        f'task.levels={ladder} of task.name={self.name!r} must rise within '
        f'[1, {most}] with task.size={self.symbols}'
      )

  @property
  def ladder(self) -> tuple[int, ...]:
    return self.levels or TASKS[self.name].levels

  @property
  def symbols(self) -> int:
    return self.size or TASKS[self.name].size

  @property
  def repeats(self) -> int:
    return self.questions or TASKS[self.name].questions

  @property
  def num_bytes(self) -> int:
    """Bytes of a row: all its questions and their answers."""
    each, levels = len(self.ladder), sum(self.ladder)
    if self.name == 'hops':
      return 2 * self.symbols + 3 * each * self.repeats
    # With a line's end after each but the last.
    per_repeat = {
      'permutations': levels + 3 * each,
      # As many brackets are closed before the question as the last level says.
      'brackets': 2 * levels + (2 * self.ladder[-1] + 2) * each,
      'copy': 2 * levels + 2 * each,
      'recall': 4 * levels + 2 * each,
    }[self.name]
    return self.repeats * per_repeat - 1

  @property
  def num_answer_bytes(self) -> int:
    """Bytes of a row that are predicted."""
    single = self.name in ('hops', 'permutations')
    return self.repeats * (len(self.ladder) if single else sum(self.ladder))

  def chance(self, level: int) -> float:
    """The share of right answers of one who guesses among those possible."""
    return {
      'hops': 1 / (self.symbols - 1),
      'permutations': 1 / math.factorial(self.symbols),
      'brackets': self.symbols**-level,
      'copy': self.symbols**-level,
      'recall': 1 / self.symbols,
    }[self.name]
