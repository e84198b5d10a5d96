"""Tries random settings: one training step, or an error of one line.

    python tests/slow/fuzz_config.py --configs 2000 --seed 0 --minutes 60

Changes one to four settings at a time of small models (dense, with experts, in
a pipeline, both), most to valid values, some to invalid ones: other types, the
ends of ranges, nan, misspelt names (`settings_strategies`). Each case is given
as a dict and as a command line, which must agree. Accepted settings must
compile on eight CPU devices, start with a finite loss, make an update of finite
parameters and trace scoring and probes; rejected ones must raise a ValueError
or OSError of one line that names a changed setting and its value. Anything else
is a failure, as are a crash and more than `runner.SECONDS`. Settings that make
the same programs are run once. Comparisons are only built, and some cases also
run through launch/train.py. An accepted model is not tried if it would take
more than `runner.ROOM` or too long to compile here.

Prints the counts and, for a failure, the simplest failing settings that
Hypothesis finds; exit status 1 for failures. The rejected cases take three
minutes; a program takes 5 s of an idle core or more, and programs are compiled
for `--minutes`. tests/config/test_fuzz_config.py does less.
"""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any
from unittest import mock

if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0'
  )

from absl import flags
import hypothesis
from ml_collections import config_flags
import settings_strategies as strategies
from slow import runner as runner_lib

from mhc import config as config_lib
from mhc.config import comparison, dicts
from mhc.runtime import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Cases of one search, which ends with the first failure.
CHUNK = 100


def command(settings: dict[str, Any]) -> list[str]:
  """Returns the flags for these settings."""
  return [
    f'--config.{name}={value if isinstance(value, str) else repr(value)}'
    for name, value in settings.items()
  ]


def shown(case: strategies.Case) -> str:
  """Returns a command line that reproduces the case."""
  given = [*command(case.base | case.changes), '--workdir=/tmp/fuzz']
  return f'python launch/train.py {" ".join(map(shlex.quote, given))[:1500]}'


def from_flags(settings: dict[str, Any]) -> config_lib.Config:
  """Builds the config as `launch/train.py --config.NAME=VALUE ...` does."""
  arguments = ['train.py', f'--config={ROOT / "configs" / "tiny.py"}']
  arguments += command(settings)
  values = flags.FlagValues()
  with mock.patch.object(sys, 'argv', arguments):
    config_flags.DEFINE_config_file('config', flag_values=values)
    cli._check_names(arguments)
    values(arguments)
  return dicts.from_dict(config_lib.Config, values.config.to_dict())


def spellings(value) -> set[str]:
  """Ways to write a value in a message, also as a flag's value."""
  found = {str(value), repr(value)}
  if isinstance(value, list | tuple):
    numbers = tuple(_float(v) if type(v) is int else v for v in value)
    found |= {repr(tuple(value)), repr(numbers)}.union(*map(spellings, value))
  with contextlib.suppress(TypeError, ValueError):
    found.add(str(_float(value)))
  return found


def _float(value) -> float:
  try:
    return float(value)
  except OverflowError:
    return float('inf')


def unclear(message: str, changes: dict[str, Any]) -> str:
  """Returns what is wrong with an error message, '' for nothing."""
  if '\n' in message:
    return 'more than one line'
  unknown = re.match(r"unknown setting '(?:base\.|config\.)?(.*?)';", message)
  if unknown and any(name.startswith(unknown[1]) for name in changes):
    return ''
  # Axes and settings of a panel hold changes of their own.
  inner = [value.items() for value in changes.values() if type(value) is dict]
  for name, value in itertools.chain(changes.items(), *inner):
    if name.rpartition('.')[2] in message and (
      name not in strategies.hints()
      or any(text in message for text in spellings(value))
    ):
      return ''
  return 'no setting that was changed, with its value'


def refusal(make, changes) -> tuple[Any, str, str]:
  """(result, error message or '', '' or what is wrong with the message)."""
  try:
    return make(), '', ''
  except (ValueError, OSError) as error:
    return None, str(error), unclear(str(error), changes)


def check(case: strategies.Case, runner: runner_lib.Runner) -> tuple[str, str]:
  """(outcome, message) of a case.

  The outcome is 'ran', 'ran before', 'built', 'refused', 'not tried' or
  'failed'.
  """
  settings = case.base | case.changes
  try:
    config, why, wrong = refusal(
      lambda: dicts.from_dict(config_lib.Config, runner_lib.nested(settings)),
      case.changes,
    )
    try:
      flagged, text, bad = refusal(lambda: from_flags(settings), case.changes)
    except flags.Error as error:
      flagged, text = None, ' '.join(str(error).split())
      bad = unclear(text, case.changes)
    if wrong or bad:
      return 'failed', f'{wrong or bad}: {why if wrong else text}'
    if config and flagged and config != flagged:
      return 'failed', f'flags make another config: {flagged}'
    if (config or flagged) is None:
      return 'refused', why
    outcome, why, wrong = refusal(
      lambda: runner(config or flagged), case.changes
    )
    if wrong:
      return 'failed', f'{wrong}: {why}'
    return outcome or 'refused', why
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    *_, ours = (one for one in frames if 'site-packages' not in one.filename)
    return 'failed', f'{error!r:.1000} at {ours.filename}:{ours.lineno}'


def check_comparison(changes: tuple[dict, dict]) -> tuple[str, str]:
  """(outcome, message) of a comparison, which is 'made' or 'refused'."""
  panel, base = changes
  named = {f'panel.{name}': value for name, value in panel.items()} | base

  def make():
    values = {'base': runner_lib.nested(base), 'panels': {'main': panel}}
    return dicts.from_dict(comparison.Comparison, values)

  try:
    made, why, wrong = refusal(make, named)
  except Exception as error:
    return 'failed', repr(error)
  # An error about a run names the run's setting, not the panel's list.
  if wrong and not any(name.removesuffix('s') in why for name in panel):
    return 'failed', f'{wrong}: {why}'
  return ('made' if made else 'refused'), why


def check_launch(
  case: strategies.Case, scratch: pathlib.Path
) -> tuple[str, str]:
  """(outcome, message) of launch/train.py, as a user runs it."""
  settings = case.base | case.changes
  for name, value in {'num_steps': 2, 'optimizer.warmup_steps': 1}.items():
    if type(case.changes.get(name, 0)) is int:
      settings[name] = value
  workdir = pathlib.Path(tempfile.mkdtemp(dir=scratch)) / 'run'
  try:
    result = subprocess.run(
      [
        sys.executable,
        ROOT / 'launch' / 'train.py',
        *command(settings),
        f'--workdir={workdir}',
      ],
      capture_output=True,
      text=True,
      check=False,
      timeout=10 * runner_lib.SECONDS,
    )
  except subprocess.TimeoutExpired as error:
    return 'failed', str(error)
  except ValueError:  # a NUL, which no command line can hold
    return 'refused', ''
  lines = result.stderr.strip().splitlines()
  errors = [line for line in lines if line.startswith('error')]
  outcome = {0: 'ran', 2: 'refused'}.get(result.returncode, 'failed')
  if 'Traceback' in result.stderr or (
    outcome == 'refused' and (len(errors) != 1 or workdir.exists())
  ):
    outcome = 'failed'
  return outcome, '\n'.join(lines[-20:] if outcome == 'failed' else errors)


class Search:
  """Counts outcomes; shrinks and prints what fails."""

  def __init__(self, seed: int, verbose: bool):
    self._seed, self._verbose = seed, verbose
    self.counts, self.shrinking = collections.Counter(), False

  def __call__(self, what: str, strategy, check, number: int):
    """Tries `number` cases of a strategy; `check` returns outcome, message."""
    for start in range(0, number, CHUNK):
      self._chunk(what, strategy, check, min(CHUNK, number - start), start)
      print(f'{what} {start + CHUNK}: {dict(self.counts)}', flush=True)

  def _chunk(self, what, strategy, check, number, start):
    worst = None

    def fails(case):
      nonlocal worst
      outcome, message = check(case)
      if outcome == 'failed':
        worst, self.shrinking = (case, message), True
      elif not self.shrinking:
        self.counts[f'{what} {outcome}'] += 1
        if self._verbose:
          print(f'{outcome}: {case}: {message}', flush=True)
      return outcome == 'failed'

    settings = hypothesis.settings(
      max_examples=number,
      database=None,
      deadline=None,
      phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    source = random.Random(f'{self._seed} {what} {start}')
    # A flaky failure counts as a failure.
    none = hypothesis.errors.NoSuchExample, hypothesis.errors.Flaky
    with contextlib.suppress(*none):
      hypothesis.find(strategy, fails, settings=settings, random=source)
    if worst:
      case, message = worst
      self.counts[f'{what} failed'] += 1
      print(f'FAILED {what} {case}: {message}')
      if isinstance(case, strategies.Case):
        print(f'  {shown(case)}', flush=True)
    self.shrinking = False


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--configs', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--launches', type=int, default=20)
  parser.add_argument('--verbose', action='store_true')
  parser.add_argument(
    '--minutes',
    type=float,
    default=600,
    help='Minutes after which no further programs are compiled.',
  )
  arguments = parser.parse_args()
  end = time.monotonic() + 60 * arguments.minutes
  search = Search(arguments.seed, arguments.verbose)
  with tempfile.TemporaryDirectory() as name:
    scratch = pathlib.Path(name)
    child = runner_lib.Child(check, scratch)

    def tried(case):
      in_time = search.shrinking or time.monotonic() < end
      return child(case, 'all' if in_time else 'build')

    def launched(case):
      outcome, why = child(case, 'build')
      if outcome in ('failed', 'not tried'):  # reported before, or too large
        return 'not tried', why
      return check_launch(case, scratch)

    search('config', strategies.cases(), tried, arguments.configs)
    search(
      'comparison',
      strategies.comparisons(),
      check_comparison,
      arguments.configs,
    )
    search('launch', strategies.cases(), launched, arguments.launches)
    child.close()
  counts = search.counts
  failures = sum(n for name, n in counts.items() if name.endswith('failed'))
  print(f'{dict(counts)}\n{failures} failures')
  return int(bool(failures))


if __name__ == '__main__':
  sys.exit(main())
