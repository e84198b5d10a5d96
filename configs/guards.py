"""HC and mHC where HC spikes, with guards that roll back.

    python launch/compare.py --config=configs/guards.py --workdir=runs/guards

The stress panel of configs/compare.py with a probe every five steps: does the
gain or the loss alert first? A spike rolls back to the last checkpoint, at most
ten steps before, and training continues with other data and half the learning
rate; if that leads into a spike again, it rolls back to the checkpoint before.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts


def get_config() -> ml_collections.ConfigDict:
  base = config.Config(
    eval_every=0,
    probe_every=5,
    checkpoint_every=10,
    keep_checkpoints=3,
    guards=config.GuardsConfig(
      nonfinite='rollback', loss_spike='rollback', rollback_rate=0.5
    ),
  )
  panel = comparison_lib.Panel(
    role='explore',
    title='Guards: depth and a high learning rate, rolled back',
    kinds=('hc', 'mhc'),
    seeds=(0, 1, 2),
    num_blocks=(48,),
    learning_rates=(5e-2,),
    num_steps=150,
    batch_size=4,
    clip_norm=0.0,
  )
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, {'guards': panel}))
  )
