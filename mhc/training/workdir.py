"""The folder of a run, which is that run's alone: its settings.

    config.json      the settings, of `FREE` the latest

The folder's other files are those of `checkpoint` and `train`.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import files

# Settings that may change when a run goes on, beside those of the mesh: none
# enters the computation, but the last for what depends on the tokens that are
# taken together.
FREE = (
  'eval_every',
  'probe_every',
  'checkpoint_every',
  'keep_checkpoints',
  'keep_every',
  'tensorboard',
  'data.on_damage',
  'data.microbatch_size',
)


def check(workdir: pathlib.Path, config: config_lib.Config):
  """Checks that `workdir` is free or holds this very run; changes nothing.

  Raises:
    ValueError: the folder holds something else, or a run with other settings.
  """
  if (workdir / 'config.json').exists():
    difference = other_setting(dicts.leaves(read_config(workdir)), config)
    if difference:
      raise ValueError(
        f'{workdir} holds a run with {difference}: choose another --workdir'
      )
  elif workdir.exists() and not workdir.is_dir():
    raise ValueError(f'{workdir} is a file: choose a folder as --workdir')
  elif workdir.exists() and any(workdir.iterdir()):
    raise ValueError(
      f'{workdir} is not empty and holds no run: choose another --workdir'
    )


def other_setting(old: Mapping[str, Any], config: config_lib.Config) -> str:
  """Which setting, not one of `FREE`, an `old` run had another value of; ''."""
  ours, old = files.jsonable(dicts.leaves(config)), files.jsonable(old)
  for name, new in ours.items():
    free = name in FREE or name.startswith(('mesh.', 'guards.'))
    # What an earlier version did not have yet it had by default.
    if not free and name in old and old[name] != new:
      return f'{name}={old[name]!r}, this one has {new!r}'
  return ''


def claim(workdir: pathlib.Path, config: config_lib.Config):
  """Makes `workdir` the folder of this run, once `check` has passed."""
  check(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dicts.to_dict(config), indent=2) + '\n'
  files.replace(workdir / 'config.json', text)


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  """The settings of the run in `workdir`.

  Raises:
    ValueError: there is none, or it is from another version.
  """
  file = workdir / 'config.json'
  try:
    return dicts.from_dict(config_lib.Config, json.loads(file.read_text()))
  except FileNotFoundError:
    raise ValueError(f'{workdir} holds no run: no {file}') from None
  except (ValueError, TypeError) as error:
    raise ValueError(f'{file} is not a readable config: {error}') from None
