"""The settings of a run as a file of its folder: config.json."""

import json

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import files
from mhc.runtime import paths

NAME = 'config.json'


def write(folder: paths.Path, config: config_lib.Config):
  """Writes the settings of a run, for `read`."""
  text = json.dumps(dicts.to_dict(config), indent=2) + '\n'
  files.replace(folder / NAME, text)


def read(folder: paths.Path) -> config_lib.Config:
  """Reads the settings of the run, or the export, in a folder.

  Raises:
    ValueError: there is none, or it is from another version.
  """
  file = folder / NAME
  try:
    values = files.read_json(file)
  except FileNotFoundError:
    raise ValueError(f'{folder} holds no run: no {file}') from None
  try:
    return dicts.from_dict(config_lib.Config, values)
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f'{file} is not a readable config: {error}') from None
