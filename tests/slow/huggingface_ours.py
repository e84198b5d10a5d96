"""Folders of our models for `huggingface`, with the logits they must have."""

import pathlib

from flax import nnx
import generic_states
import jax
import numpy as np
from slow import huggingface as proof

from mhc import config as config_lib
from mhc import interop
from mhc.config import dicts
from mhc.interop import huggingface
from mhc.model import transformer

GROUPED = config_lib.AttentionConfig(
  kind='gqa',
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  rope_dim=0,
  qk_norm=True,
  qkv_bias=True,
  rope_scaling=config_lib.RopeScalingConfig('yarn', 4, original_length=32),
)
MODELS = {
  'mhc_learned_collapse': config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig('mhc', collapse='learned')
  ),
  'mhc_eps_grouped_tied': config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig(
      'mhc', num_streams=2, sinkhorn_eps=1e-6
    ),
    attention=GROUPED,
    tied_embeddings=True,
  ),
  'mhc_experts_in_groups': config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig('mhc', collapse='sum'),
    moe=config_lib.MoEConfig(
      num_experts=8,
      num_groups=4,
      groups_per_token=2,
      gate_scale=2.5,
      normalize_gates=False,
    ),
  ),
  'identity': config_lib.ModelConfig(
    connection=config_lib.ConnectionConfig('identity')
  ),
}


def write(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes all of them below a folder, and beside them what `hy4` does."""
  folder.mkdir(parents=True)
  hy4(folder / proof.HY4)
  return [one(model, folder / name) for name, model in MODELS.items()]


def one(model: config_lib.ModelConfig, folder: pathlib.Path) -> pathlib.Path:
  """Writes a model of random weights, whose logits are of order one."""
  folder.mkdir(parents=True)
  graphdef, shapes = transformer.abstract(model)
  params = jax.tree_util.tree_map_with_path(
    _scaled, generic_states.parameters(shapes, seed=3, moved=1.0)
  )
  bias = transformer.abstract_router_bias(model)
  if bias is not None:
    rng = np.random.default_rng(0)
    bias = (0.1 * rng.normal(size=bias.shape)).astype(np.float32)
  values = huggingface.to_config(model, proof.LENGTH, (0, 1))
  tree = params | {'router_bias': bias}
  huggingface.write(folder, model, tree, values)
  merged = nnx.merge(graphdef, nnx.State(params))
  tokens = proof.tokens(model.vocab_size).astype(np.int32)
  logits = nnx.jit(type(merged).__call__)(merged, tokens, bias)
  np.save(folder / proof.LOGITS, np.float64(logits))
  return folder


def hy4(file: pathlib.Path):
  """Writes an identity model's connections by transformers' names.

  With streams x, what the first connection reads of them and by which weights
  it writes; and what the head makes of them.
  """
  model = dicts.replace(MODELS['identity'], connection={'collapse': 'learned'})
  graphdef, shapes = transformer.abstract(model)
  params = jax.tree_util.tree_map_with_path(
    _scaled, generic_states.parameters(shapes, seed=3, moved=1.0)
  )
  tensors = interop.to_deepseek(params, model, 'transformers')
  merged = nnx.merge(graphdef, nnx.State(params))
  graph, state = nnx.split(merged.dense_blocks.attention_connection)
  first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
  shape = (3, model.connection.num_streams, model.dim)
  x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
  h, context = first.pre(x)
  found = {'x': x, 'h': h, 'post': context.mappings.post.T}
  np.savez(
    file, **found, head=merged.collapse(x), eps=model.norm_eps, **tensors
  )


def _scaled(path, leaf):
  """Matrices by their width, the rest near its start."""
  name = jax.tree_util.keystr(path)
  if leaf.ndim > 1 and ('weight' in name or 'phi' in name):
    return leaf * np.float32(leaf.shape[-2] ** -0.5)
  gain = np.float32('gain' in name)
  return gain + np.float32(0.2) * (leaf - gain)
