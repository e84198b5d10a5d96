"""The processes that train one run together, and how they agree.

Each runs the same program for its own devices and reads the data itself. The
first one writes the run's files and speaks to the user. What one alone can find
out, that a folder is taken or a disk is full, the others must hear of before
they wait for it in a computation that it will never join.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


class RunRefused(ValueError):
  """Why the run cannot go on, raised by every process at the same point."""


class RunStopped(Exception):
  """The run was asked to end and is saved after a step, in every process."""

  def __init__(self, why: str, step: int, status: int | None = None):
    """`status` is what a main exits with, None for what it was told to."""
    super().__init__(f'{why}: saved after step {step}')
    self.why, self.step, self.status = why, step, status


def count() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  return index() == 0


def all_gather_text(text: str) -> list[str]:
  """What every process says, in their order."""
  if count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
  padded = np.pad(data, (0, sizes.max() + 1 - data.size))
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode()
    for row, size in zip(rows, sizes.tolist(), strict=True)
  ]


def broadcast_from_first(value: Any) -> Any:
  """The first process's value, of what JSON can say."""
  return json.loads(all_gather_text(json.dumps(value) if is_first() else '')[0])


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
  """A mistake of the user's that any process meets in the block ends them all.

  Raises:
    RunRefused: in every process, for a ValueError or OSError in one.
  """
  failure = None
  try:
    yield
  except (ValueError, OSError) as error:
    if count() == 1:
      raise
    failure = error
  said = all_gather_text(f' {failure}' if failure else '')
  if failure:
    raise RunRefused(str(failure)) from failure
  for number, text in enumerate(said):
    if text:
      raise RunRefused(f'process {number} cannot go on:{text}')


def assert_same(values: Mapping[str, Any]):
  """Raises RunRefused if a value is another one in another process."""
  mine = {name: repr(value) for name, value in values.items()}
  said = [json.loads(text) for text in all_gather_text(json.dumps(mine))]
  for number, other in enumerate(said):
    for name, value in said[0].items():
      if other.get(name) != value:
        raise RunRefused(
          f'{name} is {value} in process 0 and {other.get(name)} in process '
          f'{number}: all must be started alike'
        )


def stopping(step: int) -> bool:
  """Whether a SIGTERM to any of many processes asks to stop after this step.

  The same answer everywhere. To be asked after every step.
  """
  return multihost_utils.reached_preemption_sync_point(step)
