"""Models of others whose training speed on TPUs is published, to plan them.

    python launch/aot.py --config=configs/published.py:llama2_70b \
        --topology=v5p:8x8x4

The planner is held against what MaxText measured (docs/planner.md). The sizes,
tokens a device and the strategy (parameters sharded over all devices, nothing
else) are theirs; attention is our latent attention in place of grouped queries.
"""

import ml_collections

from mhc import config
from mhc.config import dicts


def llama2_70b() -> config.Config:
  """80 dense blocks; 4 rows of 4,096 tokens a device on 256 devices."""
  return _run(
    rows=4,
    model=config.ModelConfig(
      vocab_size=32_000,
      num_blocks=80,
      dim=8192,
      ffn_dim=28_672,
      attention=config.AttentionConfig(
        num_heads=64, head_dim=128, rope_dim=64, kv_rank=512
      ),
    ),
  )


def mixtral_8x7b() -> config.Config:
  """32 blocks of 8 experts, 2 a token; 12 rows a device on 256 devices."""
  return _run(
    rows=12,
    model=config.ModelConfig(
      vocab_size=32_000,
      num_blocks=32,
      dim=4096,
      attention=config.AttentionConfig(
        num_heads=32, head_dim=128, rope_dim=64, kv_rank=512
      ),
      moe=config.MoEConfig(
        num_experts=8,
        experts_per_token=2,
        num_shared=0,
        expert_dim=14_336,
        num_dense_blocks=0,
      ),
    ),
  )


RUNS = {run.__name__: run for run in (llama2_70b, mixtral_8x7b)}
DEVICES = 256


def _run(rows: int, model: config.ModelConfig) -> config.Config:
  model = dicts.replace(
    model,
    dtype='bfloat16',
    recompute='full',
    connection=dict(kind='residual', collapse='mean'),
  )
  return config.Config(
    model=model,
    data=config.DataConfig(
      seq_len=4096, batch_size=DEVICES * rows, microbatch_size=rows
    ),
  )


def get_config(name: str = 'llama2_70b') -> ml_collections.ConfigDict:
  if name not in RUNS:
    raise ValueError(
      f'configs/published.py has no {name!r}; it has {", ".join(RUNS)}'
    )
  return ml_collections.ConfigDict(dicts.to_dict(RUNS[name]()))
