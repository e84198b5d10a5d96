"""Ways to balance the load of experts: by bias, by Sinkhorn, not at all.

    python launch/compare.py --config=configs/balance.py:3m \
      --workdir=runs/balance

The argument is a rung of the ladder. Expected (3m, 300 steps of 1,536 bytes):
under the loss-free bias of DeepSeek-V3 the largest load over the mean falls
below 1.5 within 70 steps and then to 1.3; a doubly stochastic assignment starts
at 1.6 and ends at 1.4; without balancing it stays about 4.
"""

import ml_collections

from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

TITLES = {
  'bias': 'Loss-free balancing by a bias',
  'sinkhorn': 'Doubly stochastic assignment',
  'none': 'No balancing',
}


def get_config(size: str = '3m') -> ml_collections.ConfigDict:
  base = presets.ladder(size)
  panels = {
    router: comparison_lib.Panel(
      title=title,
      kinds=('mhc',),
      seeds=(0,),
      num_blocks=(base.model.num_blocks,),
      learning_rates=(base.optimizer.learning_rate,),
      num_steps=base.num_steps,
      batch_size=base.data.batch_size,
      clip_norm=base.optimizer.clip_norm,
      router=router,
    )
    for router, title in TITLES.items()
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
