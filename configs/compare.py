"""The default comparison: residual, HC, mHC and identity on two CPU cores.

    make compare

`quality`: 8 blocks, cosine decay, 2,048 tokens a step, five seeds: losses,
gains and what is left of the streams' differences, with verdicts. `stress`: 48
blocks at a learning rate where the unconstrained mixing of HC becomes unstable,
without clipping: how often the loss spikes. configs/noise.py has candidates for
its settings. About ten minutes on two cores.
"""

import ml_collections

from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

# Standard deviations of the differences over seeds 10 to 14 (docs/results.md).
EXPECTED = (
  (('mhc', 'residual'), 0.0070),
  (('mhc', 'identity'), 0.0050),
  (('mhc', 'hc'), 0.0060),
)


def get_config() -> ml_collections.ConfigDict:
  base = presets.small_comparison(final_sequences=1024)
  panels = {
    'quality': comparison_lib.Panel(
      title='Quality: losses, gains and contraction',
      kinds=('residual', 'hc', 'mhc', 'identity'),
      seeds=(10, 11, 12, 13, 14),
      num_blocks=(8,),
      learning_rates=(1.5e-2,),
      num_steps=100,
      batch_size=32,
      contrasts=(
        ('mhc', 'residual'),
        ('mhc', 'identity'),
        ('mhc', 'hc'),
      ),
      expected_sd=EXPECTED,
    ),
    'stress': comparison_lib.Panel(
      title='Stress: depth and a high learning rate, no clipping',
      kinds=('hc', 'mhc'),
      seeds=(10, 11, 12, 13),
      num_blocks=(48,),
      learning_rates=(5e-2,),
      num_steps=60,
      batch_size=4,
      clip_norm=0.0,
      settings=(
        ('optimizer.schedule', 'constant'),
        ('data.microbatch_size', 0),
        ('eval_sequences', 64),
        ('final_sequences', 64),
        ('probe_every', 10),
      ),
      contrasts=(('mhc', 'hc'),),
    ),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
