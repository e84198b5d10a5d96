"""Parameters and FLOPs of a model from its settings, nothing allocated.

As the paper counts (reconstructed from its Table 5): total is every parameter,
connections included; active leaves out the experts that a token does not visit
and one of the two vocabulary matrices.
"""

from flax import nnx

from mhc import config as config_lib
from mhc.model import transformer
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib


def count(
  config: config_lib.ModelConfig, seq_len: int
) -> dict[str, int | float]:
  """Counts of a model trained on rows of `seq_len` tokens.

  Returns:
    total_params, active_params, connection_params.
    flops_per_token: of one training step (forward and backward, nothing
      recomputed): 6 for each active parameter in a matrix product, causal
      attention, and reading, mixing and writing the streams.
    activation_bytes_per_token: kept for the backward pass, see `memory`.
  """
  abstract = nnx.eval_shape(
    lambda: transformer.Transformer(config, rngs=nnx.Rngs(0))
  )
  sizes = {
    tuple(str(key) for key in path): leaf.size
    for path, leaf in nnx.to_flat_state(nnx.state(abstract))
  }

  def total(wanted):
    return sum(size for path, size in sizes.items() if wanted(path))

  idle = 0
  if config.moe.num_experts:
    routed = total(lambda path: mesh_lib.EXPERT in mesh_lib.spec(path))
    share = config.moe.num_experts - config.moe.experts_per_token
    idle = routed * share // config.moe.num_experts
  everything = total(lambda path: True)
  active = everything - idle - total(lambda path: path[0] == 'embed')
  return {
    'total_params': everything,
    'active_params': active,
    'connection_params': total(
      lambda path: (
        path[0] == 'collapse'
        or any(name.endswith('_connection') for name in path)
      )
    ),
    'flops_per_token': 6 * active
    + 3 * _attention_flops(config, seq_len)
    + 3 * _stream_flops(config),
    'activation_bytes_per_token': sum(memory.activations(config).values()),
  }


def _attention_flops(config, seq_len):
  """Scores and weighted values of a token that sees seq_len / 2 others."""
  c = config.attention
  per_key = 2 * c.num_heads * (2 * c.head_dim + c.rope_dim)
  return config.num_blocks * per_key * seq_len // 2


def _stream_flops(config):
  """H_pre x, H_res x and H_post^T y of every sub-layer."""
  n = config.connection.streams
  if n == 1:
    return 0
  return 2 * config.num_blocks * 2 * (n * n + 2 * n) * config.dim
