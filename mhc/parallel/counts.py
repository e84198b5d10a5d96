"""Parameter and FLOP counts of a model, from its config; nothing is allocated.

As the paper counts (reconstructed from its Table 5): total is every parameter,
connections included; active excludes the experts that a token is not routed to
and the embedding, unless that is the matrix of the logits too.
"""

import collections
import functools

import jax

from mhc import config as config_lib
from mhc.kernels import chips
from mhc.model import parameters
from mhc.model import transformer
from mhc.parallel import memory


def count(
  config: config_lib.ModelConfig, seq_len: int
) -> dict[str, int | float]:
  """Counts for a model trained on sequences of `seq_len` tokens.

  Returns:
    total_params, active_params, connection_params.
    flops_per_token: of one training step (forward and backward, nothing
      recomputed): 6 for each active parameter in a matrix product, causal
      attention, and reading, mixing and writing the streams.
    activation_bytes_per_token: saved for the backward pass, see `memory`.
  """
  sizes, used = _sizes(config), 0
  if config.moe.num_experts:
    unused = config.moe.num_experts - config.moe.experts_per_token
    used = sizes['routed'] - sizes['routed'] * unused // config.moe.num_experts
  active = sizes['token'] + used
  return {
    'total_params': sizes['token'] + sizes['routed'] + sizes['lookup'],
    'active_params': active,
    'connection_params': sizes['connections'],
    'flops_per_token': 6 * active
    + 3 * _attention_flops(config, seq_len)
    + 3 * _stream_flops(config),
    'activation_bytes_per_token': sum(memory.activations(config).values()),
  }


def peak_tokens_per_s(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> float | None:
  """Tokens a second at the devices' peak, which MFU is a share of.

  None for devices whose peak is unknown, such as CPUs.
  """
  peak = chips.peak_flops(mesh.devices.flat[0].device_kind)
  if peak is None:
    return None
  counted = count(config.model, config.data.seq_len)
  return mesh.size * peak / counted['flops_per_token']


@functools.lru_cache(maxsize=64)
def _sizes(config):
  """Numbers of parameters by how they are counted, and the connections'.

  Kept, for the runs of a comparison share their models.
  """
  _, params = transformer.abstract(config)
  sizes = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    row = parameters.row(path)
    # A table that makes the logits too meets every token.
    tied = config.tied_embeddings and row.counted == 'lookup'
    sizes['token' if tied else row.counted] += leaf.size
    if row.counted == 'none':
      continue
    if row.part == 'connection':
      sizes['connections'] += leaf.size
  return sizes


def _attention_flops(config, seq_len):
  """FLOPs of scores and weighted values; a token attends to seq_len / 2."""
  c = config.attention
  per_key = 2 * c.num_heads * (c.key_dim + c.head_dim)
  return config.num_blocks * per_key * seq_len // 2


def _stream_flops(config):
  """FLOPs of H_pre x, H_res x and H_post^T y in every sub-layer."""
  n = config.connection.streams
  if config.connection.kind == 'frac':  # m reads, m mixed fractions
    m = config.connection.num_streams
    return 2 * config.num_blocks * 2 * (2 * m + 1) * config.dim
  if n == 1:
    return 0
  mixed = n * n if config.connection.mixes_streams else 0
  return 2 * config.num_blocks * 2 * (mixed + 2 * n) * config.dim
