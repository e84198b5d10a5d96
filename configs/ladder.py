"""Residual, HC and mHC on a rung of the mixture-of-experts ladder.

    python launch/compare.py --config=configs/ladder.py:3m --workdir=runs/3m

The argument is the rung: 1m, 3m, 10m, 30m or 100m active parameters
(mhc/config/presets.py derives them from the paper's models). 300 steps of 1,536
bytes are far from trained: the paper's own ratio is 64 tokens per active
parameter, set --config.panels.ladder.num_steps. configs/balance.py compares
ways to balance the experts' load.
"""

import ml_collections

from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets


def get_config(size: str = '3m') -> ml_collections.ConfigDict:
  base = presets.ladder(size)
  panel = comparison_lib.Panel(
    title=f'Mixture of experts, about {size.upper()} active parameters',
    kinds=('residual', 'hc', 'mhc'),
    seeds=(0,),
    num_blocks=(base.model.num_blocks,),
    learning_rates=(base.optimizer.learning_rate,),
    num_steps=base.num_steps,
    batch_size=base.data.batch_size,
    clip_norm=base.optimizer.clip_norm,
    role='explore',
  )
  comparison = comparison_lib.Comparison(base, {'ladder': panel})
  return ml_collections.ConfigDict(dicts.to_dict(comparison))
