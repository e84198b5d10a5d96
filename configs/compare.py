"""The default comparison: residual, HC, mHC and identity on a CPU.

    make compare

`main`: 16 blocks; quality, gains. `stress`: 48 blocks at a learning rate where
the unconstrained mixing of HC becomes unstable (in two of three seeds tried),
without clipping. Expected on two CPU cores: about ten minutes.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts


def get_config() -> ml_collections.ConfigDict:
  base = config.Config(eval_every=100, probe_every=25, checkpoint_every=200)
  panels = {
    'main': comparison_lib.Panel(
      title='Main panel: quality and gains',
      kinds=('residual', 'hc', 'mhc', 'identity'),
      seeds=(0, 1),
      num_blocks=(16,),
      learning_rates=(7e-3,),
      num_steps=400,
      batch_size=8,
      clip_norm=1.0,
    ),
    'stress': comparison_lib.Panel(
      title='Stress panel: depth and a high learning rate, no clipping',
      kinds=('residual', 'hc', 'mhc'),
      seeds=(0, 1),
      num_blocks=(48,),
      learning_rates=(2e-2,),
      num_steps=150,
      batch_size=4,
      clip_norm=0.0,
    ),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
