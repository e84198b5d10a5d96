"""Every kind of panel in about two minutes, to try the machine, not the models.

    python launch/compare.py --config=configs/smoke.py --workdir=runs/smoke

Two blocks, 40 steps, two seeds: its report says that nothing is tested.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts

STREAMS = 'model.connection.num_streams'


def get_config() -> ml_collections.ConfigDict:
  base = config.Config(
    eval_every=0,
    eval_sequences=32,
    final_sequences=64,
    probe_every=20,
    checkpoint_every=0,
    data=config.DataConfig(microbatch_size=4),
    optimizer=config.OptimizerConfig(schedule='cosine', warmup_steps=5),
  )

  def panel(title, **changes):
    own = dict(num_blocks=(2,), num_steps=40, batch_size=8)
    own |= dict(kinds=('residual', 'mhc'), seeds=(0, 1))
    return comparison_lib.Panel(**{'title': title, **own, **changes})

  panels = {
    'tune': panel(
      'Learning rates',
      seeds=(100,),
      learning_rates=(3e-3, 1e-2, 3e-2),
      role='tune',
    ),
    'main': panel(
      'Designs and matched residuals',
      kinds=('residual', 'residual_params', 'residual_replicate', 'mhc'),
      learning_rates=(),
      tuned_on='tune',
    ),
    'streams': panel(
      'Number of streams', axes={STREAMS: (1, 2)}, role='explore'
    ),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
