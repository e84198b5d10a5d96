"""Whether two models are the same but for what is around their sub-layers."""

import dataclasses

from mhc import config as config_lib
from mhc.config import dicts

# What changes no result, or the training alone.
FREE = frozenset(
  (
    *('dtype', 'recompute', 'recompute_every', 'adapter_rank'),
    *('attention.implementation', 'attention.value_residual'),
    *(
      f'moe.{name}'
      for name in (
        *('router', 'bias_speed', 'balance_loss', 'dispatch'),
        *('capacity_factor', 'transport', 'buffer_factor'),
      )
    ),
  )
)


def difference(
  ours: config_lib.ModelConfig, theirs: config_lib.ModelConfig
) -> str:
  """The first setting of the body that differs: both values; '' for none."""
  other = _settings(theirs)
  for name, value in _settings(ours).items():
    if value != other[name]:
      return f'model.{name}={value!r}, not {other[name]!r}'
  return ''


def _settings(model):
  moe, attention = model.moe, model.attention
  usual = config_lib.MoEConfig()
  if not moe.num_experts:
    moe = usual
  elif moe.num_groups == moe.groups_per_token:
    moe = dataclasses.replace(moe, num_groups=1, groups_per_token=1)
  if attention.kind == 'gqa' and attention.rotated == attention.head_dim:
    attention = dataclasses.replace(attention, rope_dim=0)
  model = dataclasses.replace(model, moe=moe, attention=attention)
  return {
    name: value
    for name, value in dicts.leaves(model).items()
    if name not in FREE and not name.startswith('connection.')
  }
