"""Command-line code that the mains share: config from flags, one-line errors.

A usage error (an unknown flag, a value out of range, unusable data, a folder
that belongs to another run) ends in one line on stderr and exit status 2;
anything else is a bug and keeps its traceback. Of several processes only the
first one reports progress; each reports its errors.
"""

from collections.abc import Callable, Sequence
import functools
import os
import pathlib
import re
import runpy
import signal
import sys
import threading
import time
import traceback

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from mhc.config import checks, dicts
from mhc.runtime import accelerators
from mhc.runtime import console
from mhc.runtime import machine
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.runtime import phases
from mhc.runtime import preemption
from mhc.runtime import retry
from mhc.runtime import signals

# The folder configs/ of a clone, mhc/configs/ of an installed package.
CONFIGS = next(
  folder
  for parent in pathlib.Path(__file__).resolve().parents[1:3]
  if (folder := parent / 'configs').is_dir()
)
# Flags of the mains that are folders to write.
FOLDERS = 'workdir', 'out'
AGAIN = 'The same command resumes the run.'

flags.DEFINE_bool('traceback', False, 'Show the traceback of a usage error.')


def define_config(default: str):
  """Defines --config: a config file, its settings as --config.NAME."""
  # Not as the flag's default: ml_collections would first apply the overrides to
  # that, even those for another file. In sys.argv, which workers start with.
  try:
    # What a --flagfile holds is as if it had been typed: ml_collections looks
    # for overrides in sys.argv.
    sys.argv[1:] = flags.FLAGS.read_flags_from_files(sys.argv[1:])
  except flags.Error as error:
    _fail(str(error))
  if not any(re.match('--?config(=|$)', argument) for argument in sys.argv):
    sys.argv.insert(1, f'--config={CONFIGS / default}.py')
  sys.argv[1:] = _with_configs(sys.argv[1:])
  # A config may import its neighbours.
  sys.path.append(str(pathlib.Path(_given_config(sys.argv)[0]).parent))
  config_flags.DEFINE_config_file(
    'config',
    help_string='Config file, or the name of one of configs/, such as smoke; '
    'any of its settings can be given as --config.NAME=VALUE. '
    f'(default: {default})',
  )


def config[T](cls: type[T]) -> T:
  """Returns --config with its overrides as a typed config."""
  return dicts.from_dict(cls, flags.FLAGS.config.to_dict())


def define_processes():
  """Defines the flags by which processes find each other, see `join`."""
  flags.DEFINE_bool(
    'distributed',
    False,
    'Join the other processes of a cluster that JAX recognises (TPU, Slurm, '
    '...). Elsewhere give --coordinator, --num_processes and --process_id.',
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
  flags.DEFINE_integer('num_processes', None, 'Number of processes in the run.')
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')


def define_end():
  """Defines the flags for stopping a run before its last step."""
  flags.DEFINE_string(
    'max_time',
    None,
    'Save a checkpoint and stop after this time, such as 90s, 30m or 1h30m; '
    'the same command resumes the run.',
  )
  flags.DEFINE_integer(
    'stop_status',
    0,
    'Exit status of a run that was stopped by SIGTERM or --max_time, and saved '
    'its checkpoint.',
    0,
    255,
  )


def define_profile():
  """Defines the flag for a profile of some steps."""
  flags.DEFINE_string(
    'profile_steps',
    None,
    'FIRST:LAST: a profile of these steps, such as 10:15, in profile/ of the '
    "run's folder, for xprof and Perfetto.",
  )


def define_tokenizer() -> flags.FlagHolder:
  """Defines the vocabulary of a run whose own is unknown."""
  return flags.DEFINE_string(
    'tokenizer',
    None,
    'tokenizer.json of a run that does not know its own, for token files of '
    'others.',
  )


def deadline() -> float | None:
  """Returns when --max_time is up, by `time.monotonic`.

  Raises:
    ValueError: --max_time is not a time.
  """
  text = flags.FLAGS.max_time
  return None if text is None else time.monotonic() + preemption.seconds(text)


def join():
  """Initializes jax.distributed, if the flags ask for it.

  To be called before anything uses a device.

  Raises:
    ValueError: conflicting or missing flags, or no cluster.
  """
  names = ('coordinator', 'num_processes', 'process_id')
  coordinator, number, index = given = [flags.FLAGS[n].value for n in names]
  if given == [None] * 3:
    if not flags.FLAGS.distributed:
      return
  elif flags.FLAGS.distributed:
    raise ValueError(
      '--distributed detects the cluster by itself: do not combine it with '
      '--coordinator, --num_processes or --process_id'
    )
  elif None in given:
    missing = ', '.join(f'--{n}' for n in names if flags.FLAGS[n].value is None)
    raise ValueError(
      '--coordinator, --num_processes and --process_id are required together: '
      f'add {missing}'
    )
  elif not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(f'--coordinator={coordinator} must be HOST:PORT')
  elif not 0 <= index < number:
    raise ValueError(
      f'--process_id={index} must be at least 0 and less than '
      f'--num_processes={number}'
    )
  try:
    jax.distributed.initialize(coordinator, number, index)
  except ValueError as error:
    raise ValueError(
      f'--distributed found no cluster that JAX recognises ({error}): give '
      '--coordinator, --num_processes and --process_id instead'
    ) from error


def run(
  main: Callable[..., None],
  choices: tuple[str, ...] = (),
  words: bool = False,
  computes: bool = True,
):
  """Runs a main without arguments, or with one of `choices`, as app.run does.

  The choice is the command line's first word, by default the first of them.
  With `words`, main receives all words. One that `computes` is for a GPU or
  TPU where there is one: a line says so if JAX cannot use it.
  """
  console.never_fail()
  machine.skip_search()
  app.run(
    lambda rest: _guarded(functools.partial(main, *rest[1:]), computes),
    flags_parser=functools.partial(_parse, choices=choices, free=words),
  )


def end_with_workers(statuses: Sequence[int]):
  """Ends this process as its workers have ended, which have not done all.

  Raises:
    ChildProcessError: one of them failed; else they had been asked to stop.
  """
  bad = [status for status in statuses if status]
  if bad:
    raise ChildProcessError(
      f'{len(bad)} of {len(statuses)} workers ended with status '
      f'{", ".join(map(str, bad))}, see their lines above. {AGAIN}'
    )
  console.print_line(f'The workers have been stopped. {AGAIN}')
  sys.exit(flags.FLAGS.stop_status)


def _guarded(main, computes):
  status = 0
  if computes and not (_process_id() or '--worker' in sys.argv):
    accelerators.tell_if_unused()
  try:
    for name in FOLDERS:
      if name in flags.FLAGS and (given := flags.FLAGS[name].value):
        every = [given] if isinstance(given, str) else given
        found = [paths.given(one, f'--{name}') for one in every]
        flags.FLAGS[name].value = found if given is every else found[0]
    with signals.Handlers(_stop_status(), multihost.count):
      retry.as_os_error(main, 'a bucket')
  except (Exception, KeyboardInterrupt) as error:
    status = _explain(error)
    ended = isinstance(error, multihost.RunRefused | multihost.RunStopped)
    if multihost.count() > 1 and not ended:
      # The others wait for this process in a computation; at a normal exit
      # Python would wait for them.
      _leave(status)
    if status == 1 and not _stranded():
      raise
  if _stranded():
    if multihost.count() > 1:
      jax.distributed.shutdown()
    _leave(status)
  sys.exit(status)


def _stranded() -> bool:
  """Whether Python's exit would wait for threads of a save that failed.

  They wait for its folder, ten minutes or, if the clock was set back, forever.
  """
  return any(
    type(thread).__module__.startswith('orbax.') and not thread.daemon
    for thread in threading.enumerate()
  )


def _leave(status):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _stop_status() -> int | None:
  """--stop_status, of a main that has it."""
  names = flags.FLAGS
  return names['stop_status'].value if 'stop_status' in names else None


def _explain(error) -> int:
  """Reports why this process ends; returns its exit status."""
  match error:
    case multihost.RunStopped():
      if multihost.is_first():
        console.print_line(f'{error}. {AGAIN}')
      if error.status is None:
        return flags.FLAGS.stop_status
      return error.status
    case signals.Ended(number=number) if number != signal.SIGINT:
      status = _stop_status()
      again = '.' if status is None else f', as nothing was to save. {AGAIN}'
      console.print_line(f'\n{number.name}: ended{again}')
      return 128 + number if status is None else status
    case KeyboardInterrupt():
      if multihost.is_first():
        console.print_line(f'\nInterrupted. {AGAIN}')
      return 130
    case ValueError() | OSError() if not flags.FLAGS.traceback:
      _complain(str(error))
      return 2
  if memory := _out_of_memory(error):
    _complain(f'out of memory while {phases.failed()}: {memory}')
    return 2
  if multihost.count() > 1:
    _complain('unexpected exception, traceback follows')
  if multihost.count() > 1 or _stranded():
    traceback.print_exception(error)
  return 1


def _out_of_memory(error) -> str:
  """What could not be had, if that is what the error says; '' if not."""
  text = ' '.join(str(error).split())[:300]
  if isinstance(error, MemoryError):
    return text or 'Python could not allocate an object'
  signs = 'RESOURCE_EXHAUSTED', "can't start new thread", 'Out of memory'
  return text if any(sign in text for sign in signs) else ''


def _parse(arguments, choices, free):
  try:
    if 'config' in flags.FLAGS:
      _check_names(arguments)
    rest = flags.FLAGS(arguments)
  except flags.UnrecognizedFlagError as error:
    _fail(checks.unknown_name(error.flagname, list(flags.FLAGS)))
  except (flags.Error, ValueError, OSError) as error:
    _fail(str(error))
  words = rest[1:] or list(choices[:1])
  if words and words[0] not in choices and choices:
    _fail(f'{words[0]!r} must be one of {choices}')
  if len(words) > bool(choices) and not free:
    _fail(
      f'unexpected argument {words[-1]!r}: give settings as --config.NAME=VALUE'
    )
  if flags.FLAGS['verbosity'].using_default_value:
    # Libraries log their every step at INFO, and at ERROR what is reported here
    # in one line; --verbosity=0 shows all of it.
    flags.FLAGS.verbosity = logging.FATAL
  return [rest[0], *words]


def _with_configs(arguments: list[str]) -> list[str]:
  """The arguments, with files of configs/ in --config by their full paths."""
  found, follows = [], False
  for argument in arguments:
    flag = re.match('--?config=', argument)
    start = flag.end() if flag else 0
    if flag or follows:
      argument = argument[:start] + _find_config(argument[start:])
    follows = re.fullmatch('--?config', argument)  # --config FILE
    found.append(argument)
  return found


def _find_config(value: str) -> str:
  """Finds smoke, smoke.py and configs/smoke.py from any working directory.

  A file that is there from the working directory stays as it is.
  """
  path, *argument = value.split(':', 1)
  name = re.fullmatch(r'(?:configs/)?(\w+)(?:\.py)?', path)
  if name and not pathlib.Path(path).is_file():
    file = CONFIGS / f'{name[1]}.py'
    path = str(file) if file.is_file() else path
  return ':'.join([path, *argument])


def _given_config(arguments: list[str]) -> tuple[str, str]:
  """The path that --config gives and the argument after its colon."""
  joined = '\0'.join(arguments)  # --config=FILE and --config FILE alike
  given = re.findall('(?:^|\0)--?config[=\0]([^\0]*)', joined)
  path, _, argument = ''.join(given[-1:]).partition(':')
  return path, argument


def _check_names(arguments):
  """Checks that every --config.NAME is a setting of the file of --config."""
  path, argument = _given_config(arguments)
  if not pathlib.Path(path).is_file():
    names = sorted(file.stem for file in CONFIGS.glob('[!_]*.py'))
    raise ValueError(
      f'--config={path} does not exist: give a file, or one of '
      f'{", ".join(names)}'
    )
  try:
    get_config = runpy.run_path(path)['get_config']
    values = get_config(argument) if argument else get_config()
  except Exception as error:  # it is somebody's program
    kind = type(error).__name__
    raise ValueError(f'--config={path} fails: {kind}: {error}') from error
  known = [f'config.{name}' for name in dicts.leaves(values.to_dict())]
  for override in arguments:
    name = override.lstrip('-').split('=', 1)[0]
    if name.startswith('config.') and name not in known:
      raise ValueError(checks.unknown_name(name, known))


def _fail(message: str):
  _complain(message)
  sys.exit(2)


def _complain(message: str):
  line = re.sub(r'\s*\n\s*', ' ', message)
  number = _process_id()
  where = '' if number is None else f' in process {number}'
  console.print_line(f'error{where}: {line}')


def _process_id() -> int | None:
  """The index of this process; None for a process alone."""
  if multihost.count() > 1:
    return multihost.index()
  # jax.distributed may not be initialized yet.
  given = re.search('\0--?process_id[=\0]([0-9]+)', '\0'.join(sys.argv))
  return int(given[1]) if given else None
