"""What the mains share: settings from flags, errors as one line.

A mistake of the user's (an unknown flag, a value out of range, unusable data, a
folder that belongs to another run) ends in one line on stderr and exit code 2;
anything else is ours and keeps its traceback.
"""

from collections.abc import Callable
import pathlib
import re
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from mhc import checks
from mhc import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def define_config(default: str):
  """The flag --config: a file of configs/, its settings as --config.NAME."""
  config_flags.DEFINE_config_file(
    'config',
    str(ROOT / 'configs' / default),
    'Config file; any of its settings can be given as --config.NAME=VALUE.',
  )


def config[T](cls: type[T]) -> T:
  """The typed settings that --config and its overrides ask for."""
  try:
    values = flags.FLAGS.config.to_dict()
  except (OSError, ImportError, SyntaxError, AttributeError) as error:
    raise ValueError(f'--config cannot be read: {error}') from error
  return config_lib.from_dict(cls, values)


def run(main: Callable[[], None]):
  """absl's app.run for a main without arguments."""
  app.run(lambda _: _guarded(main), flags_parser=_parse)


def _parse(arguments):
  try:
    rest = flags.FLAGS(arguments)
  except flags.Error as error:
    _fail(_explain(error))
  except (ValueError, OSError, ImportError, SyntaxError) as error:
    _fail(f'--config cannot be read: {error}')
  if len(rest) > 1:
    _fail(
      f'unexpected argument {rest[1]!r}: settings are given as --NAME=VALUE'
    )
  return rest


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


def _explain(error: flags.Error) -> str:
  if isinstance(error, flags.UnrecognizedFlagError):
    name = error.flagname
    if name.startswith('config.') and 'config' in flags.FLAGS:
      known = ['config.' + n for n in config_lib.leaves(_config_or_empty())]
      if known:
        return checks.unknown_name(name, known)
    return checks.unknown_name(name, list(flags.FLAGS))
  return re.sub(r'\s+', ' ', str(error))


def _config_or_empty():
  value = flags.FLAGS['config'].value
  return value.to_dict() if value is not None else {}


def _fail(message: str):
  print('error: ' + re.sub(r'\s*\n\s*', ' ', message), file=sys.stderr)
  sys.exit(2)


flags.DEFINE_bool('traceback', False, 'Show the traceback of a usage error.')
