"""Every connection on the main panel: the family side by side.

    python launch/compare.py --config=configs/family.py --workdir=runs/family

The setting of configs/compare.py's main panel. Expected on two CPU cores: about
fifteen minutes; all wide connections within a few hundredths of a nat of each
other and below the plain residual, only HC with a gain far from 1.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts


def get_config() -> ml_collections.ConfigDict:
  panel = comparison_lib.Panel(
    title='The family: every connection at one setting',
    kinds=config.KINDS,
    seeds=(0, 1),
    num_blocks=(16,),
    learning_rates=(7e-3,),
    num_steps=400,
    batch_size=8,
    role='explore',
  )
  comparison = comparison_lib.Comparison(config.Config(), {'family': panel})
  return ml_collections.ConfigDict(dicts.to_dict(comparison))
