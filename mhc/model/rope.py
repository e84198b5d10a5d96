r"""Rotary position embedding (RoPE, arXiv 2104.09864), and how it is stretched.

At position p the pair (i, i + r/2) of r numbers turns by the angle p w_i,

    w_i = theta^(-2 i / r),

so that products of queries and keys depend on the distance alone. A model is
taken to rows of s times its length by slower turns (`rope_scaling.kind`), with
t_i = L w_i / 2 pi turns in the L tokens of its rows before:

    linear    w_i / s                                          arXiv 2306.15595
    llama3    g_i w_i + (1 - g_i) w_i / s,
              g_i = clip((t_i - low) / (high - low), 0, 1)     Llama 3.1
    yarn      the same with g_i linear in i instead of t_i, between the floor
              and the ceiling of where t_i are fast and slow   arXiv 2309.00071

and with yarn rotated vectors are multiplied by m(mscale) / m(mscale_all_dim),
logits by m(mscale_all_dim)^2, m(c) = 1 + 0.1 c log s.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import config as config_lib


def rotate(
  x: Float[Array, 'b t h k'],
  config: config_lib.AttentionConfig,
  start: int | Int[Array, ''] = 0,
) -> Float[Array, 'b t h k']:
  """Turns the first `config.rotated` numbers of each head, from `start` on."""
  size, dtype = config.rotated, x.dtype
  position = (start + jnp.arange(x.shape[1])).astype(jnp.float32)
  angles = position[:, None] * rates(config)[None]
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  if (length := lengthening(config)) != 1:
    cos, sin = cos * length, sin * length
  turned, rest = x[..., :size], x[..., size:]
  first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  turned = jnp.concatenate(turned, axis=-1).astype(dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.size else turned


def rates(config: config_lib.AttentionConfig) -> Float[Array, 'i']:
  """The w_i of r/2 pairs, in radians a token, float32."""
  half, scaling = config.rotated // 2, config.rope_scaling
  pairs = jnp.arange(half, dtype=jnp.float32)
  rate = config.rope_theta ** (-pairs / half)
  match scaling.kind:
    case 'none':
      return rate
    case 'linear':
      return rate / scaling.factor
    case 'llama3':
      turns = scaling.original_length * rate / (2 * math.pi)
      kept = (turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq)
    case 'yarn':
      first, last = (
        _pair(config, turns) for turns in (scaling.beta_fast, scaling.beta_slow)
      )
      first, last = (
        max(math.floor(first), 0),
        min(math.ceil(last), 2 * half - 1),
      )
      kept = 1 - (pairs - first) / (last - first or 0.001)
  kept = jnp.clip(kept, 0, 1)
  return rate * kept + rate / scaling.factor * (1 - kept)


def lengthening(config: config_lib.AttentionConfig) -> float:
  """What the rotated numbers of queries and keys are multiplied by."""
  scaling = config.rope_scaling
  if scaling.kind != 'yarn':
    return 1.0
  return _m(scaling, scaling.mscale) / _m(scaling, scaling.mscale_all_dim)


def logit_scale(config: config_lib.AttentionConfig) -> float:
  """What the logits are multiplied by: 1 / sqrt(width), and yarn's m^2."""
  scaling, scale = config.rope_scaling, config.key_dim**-0.5
  if scaling.kind == 'yarn':
    scale *= _m(scaling, scaling.mscale_all_dim) ** 2
  return scale


def _m(scaling, weight):
  return 1 + 0.1 * weight * math.log(scaling.factor)


def _pair(config, turns):
  """The i, not an integer, of what turns so often in a row of before."""
  length = config.rope_scaling.original_length
  exponent = math.log(length / (turns * 2 * math.pi), config.rope_theta)
  return config.rotated * exponent / 2
