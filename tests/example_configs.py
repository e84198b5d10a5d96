"""Settings that several tests share: `TINY_RUN` trains in seconds."""

from mhc import config

TINY_RUN = config.Config(
  num_steps=12,
  mesh=config.MeshConfig(num_devices=2),
  model=config.ModelConfig(
    num_blocks=1,
    dim=16,
    ffn_dim=16,
    attention=config.AttentionConfig(
      num_heads=1, head_dim=8, rope_dim=4, kv_rank=8
    ),
    # For the sake of the compiler, which unrolls iterations.
    connection=config.ConnectionConfig(sinkhorn_iters=3),
    recompute='none',
  ),
  optimizer=config.OptimizerConfig(warmup_steps=2),
  data=config.DataConfig(seq_len=16, batch_size=4),
  eval_every=6,
  eval_sequences=20,
  final_sequences=20,
  probe_every=5,
  probe_sequences=2,
  checkpoint_every=4,
)
