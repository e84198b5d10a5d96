"""The paper's models, and a ladder of small ones down from them.

`paper` is Table 5 of arXiv 2512.24880. Settings that the table omits are chosen
to match its parameter counts to the last digit: untied embeddings, no query
compression, one leading dense FFN of 8 expert widths. The mesh is that of a
plan (docs/planner.md): of 512 chips of v5p for 27b, which have 2.5 rows
each and need a pipeline, 64 for 9b, 16 for 3b. Streams are kept at every
block: compiled, that takes less memory than the paper's interval, by whose
formula a block at hand holds less than it does.

`ladder` keeps the family's proportions at sizes that anyone can train: heads
1.6, latent rank 0.4 and expert width 0.7 times the model width, two shared
experts' worth halved to one, six of 64 experts to three of 16. The learning
rate is 0.6 / width; the router's bias is 20 times as fast as the family's, for
runs of a few hundred steps. From rung to rung width grows by 1.6 and depth by
two blocks.
"""

import dataclasses
from typing import NamedTuple

from mhc import config as config_lib


class _Paper(NamedTuple):
  num_blocks: int
  dim: int
  num_heads: int
  num_experts: int
  expert_dim: int
  batch_size: int
  num_steps: int
  learning_rate: float
  microbatch_size: int  # rows of a device at a time
  mesh: config_lib.MeshConfig


_PIPELINE = config_lib.MeshConfig(
  pipe=2, chunks=3, expert=4, head='vocab', keep='stages'
)
_FLAT = config_lib.MeshConfig(expert=4)
_PAPER = {
  '3b': _Paper(12, 1280, 16, 64, 896, 320, 30_000, 8.6e-4, 4, _FLAT),
  '9b': _Paper(18, 1920, 24, 64, 1280, 512, 50_000, 5.9e-4, 4, _FLAT),
  '27b': _Paper(30, 2560, 32, 72, 1536, 1280, 50_000, 4.0e-4, 1, _PIPELINE),
  '3b_1t': _Paper(12, 1280, 16, 64, 896, 2560, 100_000, 9.0e-4, 4, _FLAT),
}

# Active parameters -> (width, blocks).
_LADDER = {
  '1m': (96, 6),
  '3m': (160, 8),
  '10m': (256, 10),
  '30m': (416, 12),
  '100m': (704, 14),
}


def paper(size: str, kind: config_lib.Kind = 'mhc') -> config_lib.Config:
  """The paper's run of a size: '3b', '9b', '27b' or '3b_1t'."""
  p = _known(_PAPER, size, 'paper size')
  return config_lib.Config(
    num_steps=p.num_steps,
    model=config_lib.ModelConfig(
      vocab_size=129_280,
      num_blocks=p.num_blocks,
      dim=p.dim,
      ffn_dim=8 * p.expert_dim,
      dtype='bfloat16',
      recompute='mhc',
      recompute_every=2,
      attention=config_lib.AttentionConfig(
        num_heads=p.num_heads, head_dim=128, rope_dim=64, kv_rank=512
      ),
      connection=config_lib.ConnectionConfig(kind=kind),
      moe=config_lib.MoEConfig(
        num_experts=p.num_experts,
        experts_per_token=6,
        num_shared=2,
        expert_dim=p.expert_dim,
        num_dense_blocks=1,
      ),
    ),
    optimizer=config_lib.OptimizerConfig(
      learning_rate=p.learning_rate, warmup_steps=2000
    ),
    data=config_lib.DataConfig(
      seq_len=4096, batch_size=p.batch_size, microbatch_size=p.microbatch_size
    ),
    mesh=p.mesh,
    eval_every=1000,
    probe_every=500,
    checkpoint_every=1000,
  )


def ladder(size: str, kind: config_lib.Kind = 'mhc') -> config_lib.Config:
  """A byte-level rung: '1m', '3m', '10m', '30m' or '100m' active parameters."""
  dim, num_blocks = _known(_LADDER, size, 'ladder size')
  return config_lib.Config(
    num_steps=300,
    model=config_lib.ModelConfig(
      num_blocks=num_blocks,
      dim=dim,
      ffn_dim=round(8 * 0.7 * dim),
      recompute='mhc',
      attention=config_lib.AttentionConfig(
        num_heads=round(1.6 * dim / 32),
        head_dim=32,
        rope_dim=16,
        kv_rank=round(0.4 * dim),
      ),
      connection=config_lib.ConnectionConfig(kind=kind),
      moe=config_lib.MoEConfig(
        num_experts=16,
        experts_per_token=3,
        num_shared=1,
        expert_dim=round(0.7 * dim),
        num_dense_blocks=1,
        bias_speed=0.02,
      ),
    ),
    optimizer=config_lib.OptimizerConfig(learning_rate=0.6 / dim),
    # 1,536 tokens a step: in fewer bytes of text the loads of 16 experts are
    # uneven by chance.
    data=config_lib.DataConfig(seq_len=64, batch_size=24),
  )


def small_comparison(**changes) -> config_lib.Config:
  """The base of the comparisons that two CPU cores train: 8 rows at a time.

  Probes are of four rows, the held-out loss is measured at the end alone, and
  the rate decays to 0, by which differences scatter less over seeds.
  """
  base = config_lib.Config(
    eval_every=0,
    final_sequences=2048,
    probe_every=50,
    probe_sequences=4,
    checkpoint_every=0,
    data=config_lib.DataConfig(microbatch_size=8),
    optimizer=config_lib.OptimizerConfig(schedule='cosine'),
  )
  return dataclasses.replace(base, **changes)


def _known(table, size, what):
  if size not in table:
    raise ValueError(f'{what} {size!r} must be one of {tuple(table)}')
  return table[size]
