"""How many hops do designs follow, at which depth: a task, not text.

    python launch/compare.py --config=configs/hops.py --list
    python launch/compare.py --config=configs/hops.py --workdir=runs/hops

Each row shows a random cycle of SIZE letters as pairs (from, to) and asks where
1, 2, ... steps lead from some letter (mhc/data/questions.py). `recall`, which
asks for values of keys, is the control: two layers are enough. What is counted
is the share of seeds that come to answer a level right (docs/evaluation.md).
The whole is some ten hours of one CPU core, as `--list` predicts: begin with
fewer depths and seeds.
"""

import ml_collections

from mhc import config as config_lib
from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

SIZE = 5
KINDS = ('residual', 'hc', 'mhc', 'identity')


def get_config() -> ml_collections.ConfigDict:
  base = presets.small_comparison(final_sequences=1024)

  def panel(title, num_blocks, **task):
    settings = config_lib.TaskConfig(**task)
    return comparison_lib.Panel(
      title=title,
      kinds=KINDS,
      seeds=(0, 1, 2, 3, 4),
      num_blocks=num_blocks,
      learning_rates=(5e-3,),
      num_steps=800,
      batch_size=128,
      role='explore',
      settings=(
        *((f'data.task.{name}', value) for name, value in task.items()),
        ('data.seq_len', settings.num_bytes + 1),
        ('data.microbatch_size', 0),
        ('optimizer.weight_decay', 0.0),
        ('optimizer.warmup_steps', 100),
        ('eval_every', 50),
        ('eval_sequences', 128),
        ('model.ffn_dim', 256),
        ('model.attention.num_heads', 4),
        ('model.attention.head_dim', 16),
        ('model.attention.rope_dim', 8),
        ('model.recompute', 'none'),
      ),
    )

  panels = {
    'hops': panel(
      f'Hops along a cycle of {SIZE}',
      (2, 4, 8),
      name='hops',
      size=SIZE,
      levels=(1, 2, 3),
      questions=4,
    ),
    'recall': panel(
      'Control: values of keys', (4,), name='recall', size=4, levels=(2, 4)
    ),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
