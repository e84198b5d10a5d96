"""The tensors of Hugging Face's classes, as those of `names` under other names.

DeepSeek's RoPE turns the pairs (2 i, 2 i + 1), ours (i, i + r/2): the rows that
make rotated numbers are in another order, of queries and of the rotary key.
"""

import re

import numpy as np

from mhc import config as config_lib
from mhc.interop import names

ROOTS = {
  'embed.weight': 'model.embed_tokens.weight',
  'norm.weight': 'model.norm.weight',
  'head.weight': 'lm_head.weight',
}
NORMS = {
  'attention_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
}
GROUPED = {
  'query': 'q_proj',
  'key': 'k_proj',
  'value': 'v_proj',
  'out': 'o_proj',
  'query_norm': 'q_norm',
  'key_norm': 'k_norm',
}
LATENT = {
  'query_down': 'q_a_proj',
  'query_norm': 'q_a_layernorm',
  'down': 'kv_a_proj_with_mqa',
  'norm': 'kv_a_layernorm',
  'up': 'kv_b_proj',
  'out': 'o_proj',
}
SITES = {'attn': 'attention', 'ffn': 'ffn'}
ROUTER = {'weight': 'gate.weight', 'bias': 'gate.e_score_correction_bias'}


def tensors(
  model: config_lib.ModelConfig, *, interleaved: bool = True
) -> list[names.Tensor]:
  """All tensors of a model.

  Args:
    model: of kind='residual', or one that modeling_mhc.py computes.
    interleaved: whether latent attention's rotated pairs are neighbours.
  """
  if model.connection.kind != 'residual':
    return [
      part._replace(name=_own(part.name)) for part in names.tensors(model)
    ]
  return [
    part._replace(
      name=_name(part.name, model.attention),
      rows=_rows(part.name, model.attention, interleaved),
    )
    for part in names.tensors(model)
  ]


def _own(ours):
  ours = re.sub(r'hc_(attn|ffn)_', lambda m: f'{SITES[m[1]]}_connection.', ours)
  return ours.replace('hc_head_', 'collapse.')


def _name(ours, attention):
  if ours in ROOTS:
    return ROOTS[ours]
  _, block, site, *rest = ours.split('.')
  if site in NORMS:
    there = [NORMS[site], *rest]
  elif site == 'attention':
    by_name = GROUPED
    if attention.kind == 'mla':
      by_name = LATENT | {
        'query': 'q_b_proj' if attention.query_rank else 'q_proj'
      }
    there = ['self_attn', by_name[rest[0]], *rest[1:]]
  elif rest[0] == 'router':
    there = ['mlp', ROUTER[rest[1]]]
  else:
    rest = ['shared_experts' if r == 'shared' else r for r in rest]
    there = ['mlp', *(re.sub('^(gate|up|down)$', r'\1_proj', r) for r in rest)]
  return '.'.join(['model', 'layers', block, *there])


def _rows(ours, attention, interleaved):
  """Which of our rows is each of theirs; () for the same."""
  if attention.kind != 'mla' or not interleaved:
    return ()
  c, half = attention, attention.rope_dim // 2
  turned = np.arange(2 * half).reshape(2, half).T.reshape(-1)
  if ours.endswith('attention.query.weight'):
    head = np.concatenate([np.arange(c.head_dim), c.head_dim + turned])
    first = len(head) * np.arange(c.num_heads)
    return tuple((first[:, None] + head[None]).reshape(-1).tolist())
  if ours.endswith('attention.down.weight'):
    return (*range(c.kv_rank), *(c.kv_rank + turned).tolist())
  return ()
