"""Plain residuals given what a wide design has: parameters, memory or time.

Each control changes one thing of the plain residual of the same setting until
it has as much as its partner, the panel's `partner` at that setting.

    residual_params     the dense FFNs wider: total parameters
    residual_memory     streams, FFNs and experts wider, in proportion: bytes of
                        saved activations and of parameters with gradients and
                        the optimiser's moments
    residual_time       more steps: the time of the partner's run
    residual_replicate  gradients summed over other microbatches: nothing but
                        other rounding, the noise that no pairing removes
"""

import dataclasses

from mhc import config as config_lib
from mhc.config import dicts
from mhc.parallel import counts
from mhc.parallel import memory

# Bytes of a parameter in training: itself, gradient, two moments; float32.
STATE_BYTES = 16


def match(
  control: str,
  plain: config_lib.Config,
  partner: config_lib.Config,
  time_ratio: float | None,
) -> config_lib.Config:
  """The config of a control.

  Args:
    control: one of `comparison.CONTROLS`.
    plain: the plain residual at this setting.
    partner: the design that it is matched to, at this setting.
    time_ratio: the partner's step time over the residual's, as measured.

  Raises:
    ValueError: nothing of that size can be matched.
  """
  match control:
    case 'residual_params':
      return _with_params(plain, num_params(partner.model))
    case 'residual_memory':
      return _with_memory(plain, _bytes(partner))
    case 'residual_time':
      if time_ratio is None:
        raise ValueError('residual_time needs a measured time ratio')
      steps = max(plain.num_steps, round(plain.num_steps * time_ratio))
      return dataclasses.replace(plain, num_steps=steps)
    case 'residual_replicate':
      return dicts.override(plain, {'data.microbatch_size': _other_rows(plain)})
  raise ValueError(f'{control!r} is no control')


def num_params(model: config_lib.ModelConfig) -> int:
  return counts.count(model, seq_len=1)['total_params']


def _with_params(plain, wanted):
  """FFNs of the dense blocks as wide as come nearest."""
  model = plain.model
  dense = model.num_blocks - model.num_moe_blocks
  missing = wanted - num_params(model)
  # Gate, up and down projections.
  width = model.ffn_dim + round(missing / (3 * model.dim * dense))
  return dicts.override(plain, {'model.ffn_dim': max(1, width)})


def _with_memory(plain, wanted):
  """The narrowest model, widened evenly, that takes as much."""
  low, high = 8, 16  # eighths of the width
  while _bytes(_wider(plain, high)) < wanted:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    if _bytes(_wider(plain, middle)) < wanted:
      low = middle
    else:
      high = middle
  return _wider(plain, high)


def _wider(plain, eighths):
  def scaled(width):
    return max(1, width * eighths // 8)

  model = plain.model
  changes = {
    'model.dim': scaled(model.dim),
    'model.ffn_dim': scaled(model.ffn_dim),
  }
  if model.moe.num_experts:
    changes['model.moe.expert_dim'] = scaled(model.moe.expert_dim)
  return dicts.override(plain, changes)


def _bytes(config) -> int:
  activations = sum(memory.activations(config.model).values())
  counted = counts.count(config.model, config.data.seq_len)
  rows = config.data.microbatch_size or config.data.batch_size
  tokens = rows * config.data.seq_len
  return activations * tokens + STATE_BYTES * counted['total_params']


def _other_rows(plain):
  """Another number of rows a microbatch that divides the batch."""
  data = plain.data
  rows = data.microbatch_size or data.batch_size
  if rows % 2 == 0:
    return rows // 2
  if data.batch_size % (2 * rows) == 0:
    return 2 * rows
  raise ValueError(
    f'residual_replicate cannot sum data.batch_size={data.batch_size} rows in '
    f'another order than by microbatches of {rows}: use an even batch'
  )
