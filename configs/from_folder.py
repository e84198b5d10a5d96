"""Training that starts from a model in a folder, as launch/convert.py writes.

    python launch/train.py --workdir=runs/mine --config=from_folder:FOLDER

The model is that of the folder: a run's, an export's or one of Hugging Face.
--config.model.connection.kind=mhc gives a plain one connections at once.
"""

import ml_collections

from mhc import config
from mhc.config import dicts
from mhc.runtime import paths
from mhc.training import start


def get_config(folder: str = '') -> ml_collections.ConfigDict:
  if not folder:
    raise ValueError('give the folder: --config=from_folder:FOLDER')
  settings = config.Config(
    start_from=folder, model=start.model_of(paths.path(folder))
  )
  return ml_collections.ConfigDict(dicts.to_dict(settings))
