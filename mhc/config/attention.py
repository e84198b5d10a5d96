"""The settings of attention: latent or grouped-query, and its rotation."""

import dataclasses
from typing import Literal

from mhc.config import checks


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """How RoPE is stretched to rows longer than it was trained on: model/rope.py.

  The names are those of Hugging Face configs, without `_factor`.
  """

  kind: Literal['none', 'linear', 'llama3', 'yarn'] = 'none'
  factor: float = 1.0
  # Tokens of the rows before (`original_max_position_embeddings`).
  original_length: int = 0
  # Of llama3: what turns more than `high_freq` times in a row stays, what turns
  # less than `low_freq` times is slowed by `factor`.
  low_freq: float = 1.0
  high_freq: float = 4.0
  # Of yarn: the same, by `beta_fast` and `beta_slow` turns; and the weights of
  # log(factor) / 10 in the length of rotated vectors.
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 0.0

  def __post_init__(self):
    checks.check_types(self)
    used = {
      'none': (),
      'linear': ('factor',),
      'llama3': ('factor', 'original_length', 'low_freq', 'high_freq'),
      'yarn': (
        *('factor', 'original_length', 'beta_fast', 'beta_slow'),
        *('mscale', 'mscale_all_dim'),
      ),
    }[self.kind]
    checks.are_default(self, f'kind={self.kind!r}', {'kind', *used})
    checks.at_least(self, factor=1)
    checks.at_least(self, original_length=0)
    if 'original_length' in used and not self.original_length:
      raise ValueError(
        f'rope_scaling.kind={self.kind!r} wants rope_scaling.original_length: '
        'the tokens of the rows before'
      )
    checks.positive(self, 'low_freq', 'beta_slow')
    checks.not_negative(self, 'mscale', 'mscale_all_dim')
    for low, high in (('low_freq', 'high_freq'), ('beta_slow', 'beta_fast')):
      if not getattr(self, low) < getattr(self, high):
        raise ValueError(
          f'rope_scaling.{low}={getattr(self, low)} must be less than '
          f'{high}={getattr(self, high)}'
        )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Multi-head latent attention (DeepSeek-V2), or grouped-query attention."""

  # 'mla': keys and values from one latent vector of a token (model/mla.py);
  # 'gqa': from the token, for groups of heads (model/gqa.py).
  kind: Literal['mla', 'gqa'] = 'mla'
  num_heads: int = 2
  # Of queries, keys and values; in latent attention without what is rotated.
  head_dim: int = 32
  # Rotated numbers: of latent attention's queries, beside head_dim; of grouped
  # queries, the first of head_dim, 0 for all.
  rope_dim: int = 16
  kv_rank: int = 32
  # Queries through a latent vector of this size (q-LoRA), 0 for directly.
  query_rank: int = 0
  # The norms of latent vectors have an eps of their own, 0 for model.norm_eps.
  latent_norm_eps: float = 0.0
  # Heads of keys and values, each for as many query heads: 'gqa' alone.
  num_kv_heads: int = 1
  # Biases of queries, keys and values (Qwen2): 'gqa' alone.
  qkv_bias: bool = False
  # Norms of each head's query and key before RoPE (Qwen3): 'gqa' alone.
  qk_norm: bool = False
  # Adds a learned share of the first block's values to those of every other
  # (model/value_residual.py).
  value_residual: bool = False
  rope_theta: float = 10_000.0
  rope_scaling: RopeScalingConfig = RopeScalingConfig()
  # 'auto': a kernel on TPUs, cuDNN's on NVIDIA GPUs, where they take the sizes;
  # 'xla': plain JAX everywhere.
  implementation: Literal['auto', 'xla'] = 'auto'

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(
      self, num_heads=1, head_dim=1, rope_dim=0, kv_rank=1, num_kv_heads=1
    )
    if self.rope_dim % 2:
      raise ValueError(
        f'attention.rope_dim={self.rope_dim} must be even: RoPE turns pairs'
      )
    checks.not_negative(self, 'query_rank', 'latent_norm_eps')
    checks.at_least(self, rope_theta=1)  # else angles grow beyond float32
    latent = {'kv_rank', 'query_rank', 'latent_norm_eps'}
    grouped = {'num_kv_heads', 'qkv_bias', 'qk_norm'}
    every = {field.name for field in dataclasses.fields(self)}
    unused = latent if self.kind == 'gqa' else grouped
    checks.are_default(self, f'attention.kind={self.kind!r}', every - unused)
    if self.kind == 'mla' and not self.rope_dim:
      raise ValueError(
        "attention.rope_dim=0 leaves kind='mla' without positions: it "
        'must be at least 2'
      )
    if self.kind == 'gqa':
      self._check_groups()

  def _check_groups(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'attention.num_kv_heads={self.num_kv_heads} must divide '
        f'num_heads={self.num_heads}'
      )
    if not 0 < self.rotated <= self.head_dim or self.rotated % 2:
      raise ValueError(
        f'attention.rope_dim={self.rope_dim} of head_dim={self.head_dim} must '
        'be even and at most that; 0 stands for all of an even head_dim'
      )

  @property
  def rotated(self) -> int:
    """The numbers of a head that RoPE turns."""
    if self.kind == 'gqa':
      return self.rope_dim or self.head_dim
    return self.rope_dim

  @property
  def num_value_heads(self) -> int:
    return self.num_heads if self.kind == 'mla' else self.num_kv_heads

  @property
  def carried_values(self) -> int:
    """The numbers a token that travel beside the streams."""
    return self.value_residual * self.num_value_heads * self.head_dim

  @property
  def key_dim(self) -> int:
    """The numbers of a query or key."""
    return self.head_dim + (self.rope_dim if self.kind == 'mla' else 0)
