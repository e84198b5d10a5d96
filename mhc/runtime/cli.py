"""What the mains share: settings from flags, errors as one line.

A mistake of the user's (an unknown flag, a value out of range, unusable data, a
folder that belongs to another run) ends in one line on stderr and exit code 2;
anything else is ours and keeps its traceback. Of many processes the first one
says what goes well, each what does not.
"""

from collections.abc import Callable
import functools
import glob
import os
import pathlib
import re
import runpy
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
from mhc.runtime import console
from mhc.runtime import multihost
from mhc.runtime import preemption

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
AGAIN = 'The same command goes on from here.'

flags.DEFINE_bool('traceback', False, 'Show the traceback of a usage error.')


def define_config(default: str):
  """The flag --config: a file of configs/, its settings as --config.NAME."""
  # Not as the flag's default: ml_collections applies overrides to that first,
  # also to those that are meant for another file.
  if not any(re.match('--?config(=|$)', argument) for argument in sys.argv):
    sys.argv.insert(1, f'--config={CONFIGS / default}')
  config_flags.DEFINE_config_file(
    'config',
    help_string='Config file; any of its settings can be given as '
    f'--config.NAME=VALUE. (default: configs/{default})',
  )


def config[T](cls: type[T]) -> T:
  """The typed settings that --config and its overrides ask for."""
  return dicts.from_dict(cls, flags.FLAGS.config.to_dict())


def define_processes():
  """The flags by which many processes find each other, see `join`."""
  flags.DEFINE_bool(
    'distributed',
    False,
    'This is one of many processes, started on a cluster that JAX recognises '
    '(TPU, Slurm, ...). Elsewhere, the following three.',
  )
  flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
  flags.DEFINE_integer('num_processes', None, 'How many there are.')
  flags.DEFINE_integer('process_id', None, 'Which this is, from 0.')


def define_end():
  """The flags about the end of a run that has not come to its own."""
  flags.DEFINE_string(
    'max_time',
    None,
    'Save and end after this time, such as 90s, 30m or 1h30m; the same command '
    'goes on.',
  )
  flags.DEFINE_integer(
    'stop_status',
    0,
    'Exit status of a run that was told to end, and has been saved.',
    0,
    255,
  )


def deadline() -> float | None:
  """When --max_time is up, by `time.monotonic`.

  Raises:
    ValueError: it is no time.
  """
  text = flags.FLAGS.max_time
  return None if text is None else time.monotonic() + preemption.seconds(text)


def join():
  """Makes this process one of many, if the flags say so.

  Before anything asks for a device.

  Raises:
    ValueError: flags that do not go together, or no cluster.
  """
  names = ('coordinator', 'num_processes', 'process_id')
  coordinator, number, index = given = [flags.FLAGS[n].value for n in names]
  if given == [None] * 3:
    if not flags.FLAGS.distributed:
      return
  elif flags.FLAGS.distributed:
    raise ValueError(
      '--distributed finds out what --coordinator, --num_processes and '
      '--process_id say: give either'
    )
  elif None in given:
    missing = ', '.join(f'--{n}' for n in names if flags.FLAGS[n].value is None)
    raise ValueError(
      '--coordinator, --num_processes and --process_id go together: '
      f'{missing} missing'
    )
  elif not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(f'--coordinator={coordinator} must be HOST:PORT')
  elif not 0 <= index < number:
    raise ValueError(
      f'--process_id={index} must be from 0 to --num_processes={number} less 1'
    )
  try:
    jax.distributed.initialize(coordinator, number, index)
  except ValueError as error:
    raise ValueError(
      f'--distributed is for clusters that JAX recognises ({error}): give '
      '--coordinator, --num_processes and --process_id'
    ) from error


def run(
  main: Callable[..., None],
  choices: tuple[str, ...] = (),
  words: bool = False,
):
  """absl's app.run for a main without arguments, or with one of `choices`.

  The choice is the command line's first word, by default the first of them.
  With `words`, main takes whatever words there are.
  """
  accelerators = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')
  if 'JAX_PLATFORMS' not in os.environ and not any(
    map(glob.glob, (*accelerators, '/dev/kfd'))
  ):
    # libtpu, installed to compile for TPUs, would look for one at length.
    jax.config.update('jax_platforms', 'cpu')
  app.run(
    lambda rest: _guarded(functools.partial(main, *rest[1:])),
    flags_parser=functools.partial(_parse, choices=choices, free=words),
  )


def _guarded(main):
  status = 0
  try:
    main()
  except (Exception, KeyboardInterrupt) as error:
    status = _explain(error)
    ended = isinstance(error, multihost.RunRefused | multihost.RunStopped)
    if multihost.count() > 1 and not ended:
      # The others wait for this process in a computation; as Python ends it
      # would wait for them.
      _leave(status)
    if status == 1 and not _stranded():
      raise
  if _stranded():
    if multihost.count() > 1:
      jax.distributed.shutdown()
    _leave(status)
  sys.exit(status)


def _stranded() -> bool:
  """Whether Python would wait for threads of a save that failed.

  They wait for its folder, ten minutes or, if the clock was set back, for ever.
  """
  return any(
    type(thread).__module__.startswith('orbax.') and not thread.daemon
    for thread in threading.enumerate()
  )


def _leave(status):
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _explain(error) -> int:
  """Says why this process ends; returns its exit status."""
  match error:
    case multihost.RunStopped():
      if multihost.is_first():
        console.print_line(f'{error}. {AGAIN}')
      if error.status is None:
        return flags.FLAGS.stop_status
      return error.status
    case KeyboardInterrupt():
      if multihost.is_first():
        console.print_line(f'\nInterrupted. {AGAIN}')
      return 130
    case ValueError() | OSError() if not flags.FLAGS.traceback:
      _complain(str(error))
      return 2
  if multihost.count() > 1:
    _complain('what follows')
  if multihost.count() > 1 or _stranded():
    traceback.print_exception(error)
  return 1


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
      f'unexpected argument {words[-1]!r}: settings go as --config.NAME=VALUE'
    )
  if flags.FLAGS['verbosity'].using_default_value:
    # Libraries report every step of theirs at INFO, and at ERROR what is said
    # here in a line; --verbosity=0 shows all of it.
    flags.FLAGS.verbosity = logging.FATAL
  return [rest[0], *words]


def _check_names(arguments):
  """Every --config.NAME is a setting of the file that --config names."""
  joined = '\0'.join(arguments)  # --config=FILE and --config FILE alike
  given = re.findall('(?:^|\0)--?config[=\0]([^\0]*)', joined)
  path, _, argument = ''.join(given[-1:]).partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(f'--config={path}: there is no such file')
  get_config = runpy.run_path(path)['get_config']
  values = get_config(argument) if argument else get_config()
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
  number = multihost.index() if multihost.count() > 1 else None
  if number is None:  # it may have come no further than to its flags
    given = re.search('\0--?process_id[=\0]([0-9]+)', '\0'.join(sys.argv))
    number = given and given[1]
  where = '' if number is None else f' in process {number}'
  console.print_line(f'error{where}: {line}')
