"""How much differences scatter over seeds: candidates for configs/compare.py.

    python launch/compare.py --config=configs/noise.py --workdir=runs/noise

What a comparison can see is set by the spread of the differences over seeds.
The panels vary what may reduce it: the learning rate, the tokens a step at
equal steps, and the length.
"""

import ml_collections

from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

KINDS = ('residual', 'hc', 'mhc', 'identity')


def get_config() -> ml_collections.ConfigDict:
  base = presets.small_comparison(final_sequences=4096)

  def panel(title, **changes):
    return comparison_lib.Panel(
      **{
        'title': title,
        'kinds': KINDS,
        'seeds': (0, 1, 2, 3, 4, 5),
        'num_blocks': (8,),
        'num_steps': 200,
        'batch_size': 32,
        'role': 'explore',
        'contrasts': (
          ('mhc', 'residual'),
          ('hc', 'residual'),
          ('mhc', 'identity'),
          ('mhc', 'hc'),
        ),
        **changes,
      }
    )

  panels = {
    'rate': panel('Learning rates', learning_rates=(5e-3, 1e-2)),
    'batch': panel(
      'A quarter of the tokens', batch_size=8, learning_rates=(5e-3,)
    ),
    'length': panel('Half of the steps', num_steps=100, learning_rates=(5e-3,)),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
