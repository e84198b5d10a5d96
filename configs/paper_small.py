"""The paper's questions at a small size: two hours on two CPU cores.

    python launch/compare.py --config=configs/paper_small.py --workers=2 \
        --workdir=runs/paper_small

`tune` chooses each design's learning rate on seeds of its own; `main` compares
the designs and matched residuals at these rates; `parts` is Table 1; `mixing`
asks where learned mixing differs from none; `depth`, `streams` and `iterations`
vary L, n and t_max; `stability` maps where the loss spikes. Any panel can be
left out (--panels), run on other machines, or resumed. `--list` tells what it
takes.
"""

import ml_collections

from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

KIND, CONNECTION = 'model.connection.kind', 'model.connection'
# Table 1 switches mappings on one after the other; off is 1/n, 1 and I. The
# streams start apart where nothing else would part them.
PARTS = {
  'res': dict(pre='off', post='off'),
  'res_pre': dict(post='off'),
  'res_post': dict(pre='off'),
  'pre_post': dict(res='off'),
  'static': dict(pre='static', post='static', res='static'),
}
APART = {f'{CONNECTION}.expand_scale': 'random'}


def _parts():
  """Designs of HC and mHC with some of their parts, all opened apart."""
  designs = {}
  for kind in ('hc', 'mhc'):
    designs[f'{kind}_all'] = {KIND: kind, **APART}
    for name, parts in PARTS.items():
      own = {f'{CONNECTION}.{part}': word for part, word in parts.items()}
      designs[f'{kind}_{name}'] = {KIND: kind, **APART, **own}
  return designs


def panel(title, **changes) -> comparison_lib.Panel:
  own = dict(num_blocks=(8,), num_steps=150, batch_size=32)
  return comparison_lib.Panel(**{'title': title, **own, **changes})


def _explorations():
  """Panels without verdicts: parts, depth, n, t_max and spikes."""
  return {
    'parts': panel(
      'Parts of a connection, as in Table 1',
      kinds=('residual', *_parts()),
      designs=_parts(),
      learning_rates=(5e-3,),
      contrasts=tuple((name, 'residual') for name in _parts()),
      role='explore',
    ),
    'depth': panel(
      'Depth',
      kinds=('residual', 'mhc', 'identity'),
      seeds=(0, 1),
      num_blocks=(8, 16, 32, 64),
      learning_rates=(5e-3,),
      batch_size=8,
      role='explore',
    ),
    'streams': panel(
      'Number of streams',
      kinds=('residual', 'mhc'),
      seeds=(0, 1),
      learning_rates=(5e-3,),
      axes={f'{CONNECTION}.num_streams': (1, 2, 4, 8)},
      role='explore',
    ),
    'iterations': panel(
      'Sinkhorn iterations',
      kinds=('residual', 'mhc'),
      seeds=(0, 1),
      learning_rates=(5e-3,),
      axes={f'{CONNECTION}.sinkhorn_iters': (1, 2, 5, 10, 20, 40)},
      role='explore',
    ),
    'stability': panel(
      'Spikes over depth and learning rate',
      kinds=('hc', 'mhc'),
      num_blocks=(8, 16, 32),
      learning_rates=(1e-2, 3e-2, 1e-1),
      num_steps=60,
      batch_size=8,
      clip_norm=0.0,
      settings={
        'optimizer.schedule': 'constant',
        'optimizer.warmup_steps': 20,
        'eval_sequences': 64,
        'final_sequences': 64,
        'probe_every': 20,
      },
      role='explore',
    ),
  }


def get_config() -> ml_collections.ConfigDict:
  base = presets.small_comparison(probe_every=75)

  tuned = dict(learning_rates=(), tuned_on='tune')
  panels = {
    'tune': panel(
      'Learning rates',
      kinds=('residual', 'hc', 'mhc', 'identity'),
      seeds=(100, 101),
      learning_rates=(2.5e-3, 5e-3, 1e-2, 2e-2),
      role='tune',
    ),
    'main': panel(
      'Designs at their own learning rates, 8 seeds',
      kinds=(
        *('residual', 'residual_params', 'residual_replicate'),
        *('hc', 'mhc', 'identity'),
      ),
      seeds=tuple(range(8)),
      num_steps=300,
      contrasts=(
        ('mhc', 'residual'),
        ('mhc', 'residual_params'),
        ('mhc', 'identity'),
        ('mhc', 'hc'),
        ('residual_replicate', 'residual'),
      ),
      **tuned,
    ),
    'mixing': panel(
      'Where learned mixing might differ from none',
      kinds=('mhc', 'identity', 'mhc_apart', 'identity_apart', 'mhc_soft'),
      designs={
        'mhc_apart': {KIND: 'mhc', **APART},
        'identity_apart': {KIND: 'identity', **APART},
        'mhc_soft': {KIND: 'mhc', f'{CONNECTION}.res_diagonal': 2.0},
      },
      seeds=tuple(range(20, 24)),
      learning_rates=(1e-2,),
      num_steps=300,
      contrasts=(
        ('mhc', 'identity'),
        ('mhc_apart', 'identity_apart'),
        ('mhc_soft', 'identity'),
      ),
    ),
    **_explorations(),
  }
  return ml_collections.ConfigDict(
    dicts.to_dict(comparison_lib.Comparison(base, panels))
  )
