"""Every connection at one setting: the family, by group.

    python launch/compare.py --config=configs/family.py --list
    python launch/compare.py --config=configs/family.py --workdir=runs/family

Three panels of four blocks of configs/compare.py's width, each beside the
plain residual: depth routing, widths without a constraint, and constrained
mixings. Four seeds; --list says how long it takes here. docs/designs.md has the
formulas.
"""

import ml_collections

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts

GROUPS = {
  'depth': (
    *('attn_res_block', 'attn_res', 'mhar', 'dense_former', 'x0'),
    'value_residual',
  ),
  'width': (
    *('wide_residual', 'frac', 'hc', 'identity', 'mhc', 'mhc_single_pass'),
  ),
  'mixing': ('mhc', 'mhc_lite', 'kromhc', 'cyclic', 'tbp', 'go', 'orthogonal'),
}
# No kind of connection, but a setting of attention.
VALUES = (
  ('model.connection.kind', 'residual'),
  ('model.attention.value_residual', True),
)


def get_config() -> ml_collections.ConfigDict:
  def panel(name, kinds):
    return comparison_lib.Panel(
      title=f'The family: {name}',
      kinds=('residual', *kinds),
      seeds=(0, 1, 2, 3),
      designs=(('value_residual', VALUES),) * (name == 'depth'),
      num_blocks=(4,),
      learning_rates=(7e-3,),
      num_steps=200,
      batch_size=8,
      role='explore',
    )

  panels = {name: panel(name, kinds) for name, kinds in GROUPS.items()}
  comparison = comparison_lib.Comparison(config.Config(), panels)
  return ml_collections.ConfigDict(dicts.to_dict(comparison))
