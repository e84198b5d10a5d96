"""Gaps and compute multipliers over rungs of the ladder: a night on one GPU.

    python launch/compare.py --config=configs/scaling.py --list
    python launch/compare.py --config=configs/scaling.py --budget_hours=10 \
        --config.base.data.path=data/mine --workers=4 --workdir=runs/scaling
    python launch/compare.py --config=configs/scaling.py:cpu --workers=2 \
        --workdir=runs/scaling_cpu

Rungs of one curve, each design beside residuals with as many parameters, at the
given tokens an active parameter; learning rates by the ladder's rule. It wants
0.7 billion tokens of text (launch/prepare_data.py): the default corpus of 10 MB
would be repeated. `:cpu` has the two smallest rungs for a few hundred steps on
the default text, `:tokens` the 3m rung at five lengths.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts, presets

KINDS = ('residual', 'residual_params', 'hc', 'mhc', 'identity')
# The 27B model on TPU v5p, 8 x 8 x 8, as planned (docs/planner.md).
PLANNED = (('mhc', 'the 27B on 512 v5p', 1.043),)


def _panel(rung, seeds, **changes):
  own = dict(
    title=f'Rung {rung}',
    kinds=KINDS,
    seeds=tuple(range(seeds)),
    num_blocks=(),
    learning_rates=(),
    axes={'ladder': (rung,)},
    contrasts=(('mhc', 'residual'), ('mhc', 'residual_params')),
    curve='ladder',
  )
  return comparison_lib.Panel(**{**own, **changes})


def _base(**changes):
  own = dict(
    model=presets.ladder('3m').model,
    eval_every=0,
    probe_every=100,
    probe_sequences=4,
    optimizer=config.OptimizerConfig(schedule='cosine'),
  )
  return config.Config(**{**own, **changes})


def get_config(which: str = 'gpu') -> ml_collections.ConfigDict:
  sized = dict(batch_size=128)
  match which:
    case 'gpu':
      base = _base(data=config.DataConfig(seq_len=512), checkpoint_every=1000)
      panels = {
        'rung_1m': _panel('1m', 8, tokens_per_param=64.0, **sized),
        'rung_3m': _panel('3m', 8, tokens_per_param=64.0, **sized),
        'rung_10m': _panel('10m', 4, tokens_per_param=64.0, **sized),
        'rung_30m': _panel('30m', 2, tokens_per_param=20.0, **sized),
      }
    case 'tokens':
      base = _base(data=config.DataConfig(seq_len=512), checkpoint_every=1000)
      panels = {
        f'times_{each:g}': _panel(
          '3m', 4, tokens_per_param=each, curve='tokens', **sized
        )
        for each in (4.0, 8.0, 16.0, 32.0, 64.0)
      }
    case 'cpu':
      base = _base(
        data=config.DataConfig(seq_len=64, microbatch_size=8),
        checkpoint_every=0,
        final_sequences=2048,
      )
      short = dict(num_steps=200, batch_size=24)
      panels = {
        'rung_1m': _panel('1m', 4, **short),
        'rung_3m': _panel('3m', 4, **short),
      }
    case _:
      raise ValueError(
        f'configs/scaling.py:{which} must be one of gpu, tokens, cpu'
      )
  comparison = comparison_lib.Comparison(base, panels, planned_overhead=PLANNED)
  return ml_collections.ConfigDict(dicts.to_dict(comparison))
