"""What the mains share: settings from flags, errors as one line.

A mistake of the user's (an unknown flag, a value out of range, unusable data, a
folder that belongs to another run) ends in one line on stderr and exit code 2;
anything else is ours and keeps its traceback.
"""

from collections.abc import Callable
import functools
import glob
import os
import pathlib
import re
import runpy
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from mhc import checks
from mhc import plain

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'

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
  return plain.from_dict(cls, flags.FLAGS.config.to_dict())


def run(main: Callable[..., None], choices: tuple[str, ...] = ()):
  """absl's app.run for a main without arguments, or with one of `choices`.

  The choice is the command line's first word, by default the first of them.
  """
  accelerators = ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')
  if 'JAX_PLATFORMS' not in os.environ and not any(
    map(glob.glob, (*accelerators, '/dev/kfd'))
  ):
    # libtpu, installed to compile for TPUs, would look for one at length.
    jax.config.update('jax_platforms', 'cpu')
  app.run(
    lambda words: _guarded(functools.partial(main, *words[1:])),
    flags_parser=functools.partial(_parse, choices=choices),
  )


def _guarded(main):
  try:
    main()
  except (ValueError, OSError) as error:
    if flags.FLAGS.traceback:
      raise
    _fail(str(error))
  except KeyboardInterrupt:
    print('\nInterrupted. The same command goes on from here.', file=sys.stderr)
    sys.exit(130)


def _parse(arguments, choices):
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
  if len(words) > bool(choices):
    _fail(
      f'unexpected argument {words[-1]!r}: settings go as --config.NAME=VALUE'
    )
  if flags.FLAGS['verbosity'].using_default_value:
    # Libraries report every step of theirs at INFO; --verbosity=0 shows it.
    flags.FLAGS.verbosity = logging.WARNING
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
  known = [f'config.{name}' for name in plain.leaves(values.to_dict())]
  for override in arguments:
    name = override.lstrip('-').split('=', 1)[0]
    if name.startswith('config.') and name not in known:
      raise ValueError(checks.unknown_name(name, known))


def _fail(message: str):
  print('error: ' + re.sub(r'\s*\n\s*', ' ', message), file=sys.stderr)
  sys.exit(2)
