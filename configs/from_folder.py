"""Training that starts from the model in a folder of ours.

    python launch/train.py --workdir=runs/mine --config=from_folder:FOLDER

The folder is a run's, or was written by launch/convert.py or launch/export.py.
--config.model.connection.kind=mhc gives a plain model connections. Models of
Hugging Face go through launch/convert.py first.
"""

import json
import pathlib

import ml_collections

from mhc import config
from mhc.config import dicts


def get_config(folder: str = '') -> ml_collections.ConfigDict:
  if not folder:
    raise ValueError('give the folder: --config=from_folder:FOLDER')
  file = pathlib.Path(folder) / 'config.json'
  values = json.loads(file.read_text())
  if 'model' not in values:
    raise ValueError(
      f'{file} is not of this package: launch/convert.py --from={folder} '
      '--to=residual --out=ANOTHER makes it so'
    )
  model = dicts.from_dict(config.ModelConfig, values['model'], 'model.')
  settings = config.Config(start_from=folder, model=model)
  return ml_collections.ConfigDict(dicts.to_dict(settings))
