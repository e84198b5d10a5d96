"""A profile of some steps, for xprof and Perfetto.

    runs/a/profile/plugins/profile/TIME/HOST.xplane.pb       xprof, TensorBoard
    runs/a/profile/plugins/profile/TIME/perfetto_trace.json.gz

Each step stands in it under its number.
"""

import contextlib
import re
from typing import NamedTuple

import jax

from mhc.runtime import console
from mhc.runtime import paths
from mhc.runtime import shadow

FOLDER, STEP = 'profile', 'train'


class Steps(NamedTuple):
  """The first and the last step of a profile."""

  first: int
  last: int


def steps(text: str | None) -> Steps | None:
  """Reads --profile_steps=FIRST:LAST; None for None.

  Raises:
    ValueError: it is no range of steps.
  """
  if text is None:
    return None
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found or not 1 <= int(found[1]) <= int(found[2]):
    raise ValueError(
      f'--profile_steps={text} is no range of steps, counted from 1: write '
      '10:15 for steps 10 to 15'
    )
  return Steps(int(found[1]), int(found[2]))


class Profiler:
  """Profiles the steps of a range, in every process for its own devices."""

  def __init__(self, workdir: paths.Path, wanted: Steps | None):
    self._path, self._wanted = workdir / FOLDER, wanted
    self._folder = shadow.of_folder(self._path) if wanted else None
    self._is_on = False

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """The context of a step's dispatch."""
    if self._wanted is None:
      return contextlib.nullcontext()
    if not self._is_on and self._wanted.first <= number <= self._wanted.last:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._is_on = True
    return jax.profiler.StepTraceAnnotation(STEP, step_num=number)

  def is_last(self, number: int) -> bool:
    """Whether `number` is done before the profile ends."""
    return self._is_on and number >= self._wanted.last

  def close(self):
    """Writes the profile of what has been done."""
    if self._is_on:
      try:
        jax.profiler.stop_trace()
        shadow.upload(self._path)
        console.print_line(f'profile: {self._path}')
      except Exception as error:  # of any class, as on a full disk
        message = ' '.join(str(error).split())[:200]
        console.print_line(f'NOT WRITTEN: {self._folder}: {message}')
    elif self._wanted is not None:
      console.print_line(
        f'no profile: this start has trained none of the steps '
        f'{self._wanted.first} to {self._wanted.last}'
      )
    self._is_on, self._wanted = False, None
