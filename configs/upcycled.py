"""A trained plain model goes on: as it is, and with connections from then on.

    python launch/train.py --workdir=runs/plain --config=tiny \
      --config.model.connection.kind=residual
    python launch/compare.py --config=upcycled:runs/plain \
      --workdir=runs/upcycled

All start as the same function, on the text that they were trained on, in four
orders of it. mHC - residual is declared.
"""

import dataclasses
import json
import pathlib

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts

NEW = 'mhc_10x'


def get_config(folder: str = '') -> ml_collections.ConfigDict:
  if not folder:
    raise ValueError('give the folder: --config=upcycled:FOLDER')
  values = json.loads((pathlib.Path(folder) / 'config.json').read_text())
  before = dicts.from_dict(config.Config, values)
  base = dataclasses.replace(before, start_from=folder, num_steps=200)
  panel = comparison_lib.Panel(
    title='A trained plain model goes on',
    kinds=('residual', 'mhc', 'hc', 'identity', NEW),
    designs={
      NEW: {
        'model.connection.kind': 'mhc',
        'optimizer.connection_rate': 10.0,
      }
    },
    contrasts=(('mhc', 'residual'), (NEW, 'residual')),
    seeds=(0, 1, 2, 3),
    num_blocks=(),
    learning_rates=(1e-3,),
    num_steps=200,
  )
  comparison = comparison_lib.Comparison(base, {'main': panel})
  return ml_collections.ConfigDict(dicts.to_dict(comparison))
