"""Agreement between the processes that train one run together.

Each runs the same program for its own devices and reads the data itself. The
first one writes the run's files and logs to the console. An error that only one
of them can see, such as a full disk, must reach the others before they wait for
it in a collective that it will never join.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


class RunRefused(ValueError):
  """A user error, raised by every process at the same point."""


class RunStopped(Exception):
  """The run has stopped as requested, and is saved; raised by every process."""

  def __init__(self, why: str, step: int, status: int | None = None):
    """`status` is the exit status of a main, None for --stop_status."""
    super().__init__(f'{why}: saved after step {step}')
    self.why, self.step, self.status = why, step, status


def count() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
  return index() == 0


def all_gather_text(text: str) -> list[str]:
  """Returns the text of every process, in their order."""
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
  """Returns the first process's value, which JSON must be able to encode."""
  return json.loads(all_gather_text(json.dumps(value) if is_first() else '')[0])


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
  """Raises a user error that occurs in the block of any process in all of them.

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
  texts = all_gather_text(f' {failure}' if failure else '')
  if failure:
    raise RunRefused(str(failure)) from failure
  for number, text in enumerate(texts):
    if text:
      raise RunRefused(f'process {number} cannot go on:{text}')


def assert_same(values: Mapping[str, Any]):
  """Raises RunRefused if a value differs between processes."""
  mine = {name: repr(value) for name, value in values.items()}
  given = [json.loads(text) for text in all_gather_text(json.dumps(mine))]
  for number, other in enumerate(given):
    for name, value in given[0].items():
      if other.get(name) != value:
        raise RunRefused(
          f'{name} is {value} in process 0 and {other.get(name)} in process '
          f'{number}: start all with the same settings and data'
        )


def stopping(step: int) -> bool:
  """Whether any process received a SIGTERM, to stop all after this step.

  The answer is the same in all of them. To be called after every step.
  """
  return multihost_utils.reached_preemption_sync_point(step)
