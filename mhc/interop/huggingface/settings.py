"""A Hugging Face config.json as our settings of a model, and back.

    LlamaForCausalLM        kind='gqa'
    Qwen2ForCausalLM        kind='gqa', qkv_bias
    Qwen3ForCausalLM        kind='gqa', qk_norm
    DeepseekV3ForCausalLM   kind='mla', experts or none

around the plain residual, and a class of our own, which folders bring along in
modeling_mhc.py:

    MhcForCausalLM          kind='mhc' or 'identity'

What a config asks for and our model does not have is
refused by its name. The defaults are those of the classes in transformers 5.24.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from mhc import config as config_lib
from mhc.config import dicts
from mhc.interop import body
from mhc.model import rope

LLAMA, QWEN2 = 'LlamaForCausalLM', 'Qwen2ForCausalLM'
QWEN3, DEEPSEEK = 'Qwen3ForCausalLM', 'DeepseekV3ForCausalLM'
OWN = 'MhcForCausalLM'
CODE = 'modeling_mhc.py'  # beside this file, and in folders of OWN
TYPES = {
  'llama': LLAMA,
  'qwen2': QWEN2,
  'qwen3': QWEN3,
  'deepseek_v3': DEEPSEEK,
  'mhc': OWN,
}
DEFAULTS = {
  **dict(hidden_act='silu', rms_norm_eps=1e-6, tie_word_embeddings=False),
  **dict(rope_theta=10_000.0, attention_bias=False, mlp_bias=False),
  **dict(max_position_embeddings=2048, use_sliding_window=False),
}
OF_CLASS = {
  OWN: {},
  LLAMA: {},
  QWEN2: dict(num_key_value_heads=32),
  QWEN3: dict(num_key_value_heads=32, head_dim=128),
  DEEPSEEK: {
    **dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128),
    **dict(qk_rope_head_dim=64, v_head_dim=128, rope_interleave=True),
    **dict(n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8),
    **dict(n_group=8, topk_group=4, first_k_dense_replace=3),
    **dict(routed_scaling_factor=2.5, norm_topk_prob=True),
    **dict(moe_intermediate_size=2048, scoring_func='sigmoid'),
    **dict(topk_method='noaux_tc', moe_layer_freq=1),
  },
}
# What our body is, whatever a class has to say of it.
REQUIRED = dict(
  hidden_act='silu',
  attention_bias=False,
  mlp_bias=False,
  use_sliding_window=False,
  scoring_func='sigmoid',
  topk_method='noaux_tc',
  moe_layer_freq=1,
)
INNER_EPS = (
  1e-6  # of DeepSeek's norms of latent vectors, whatever a config says
)


def architecture(values: Mapping[str, Any]) -> str:
  """The class of a config.json.

  Raises:
    ValueError: it is none of ours.
  """
  found = (values.get('architectures') or [None])[0]
  found = found or TYPES.get(values.get('model_type'), values.get('model_type'))
  if found not in OF_CLASS:
    raise ValueError(
      f'{found} is none of the classes that are read: {", ".join(OF_CLASS)}'
    )
  return found


def of_config(values: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Our settings of a config.json's model.

  Raises:
    ValueError: the model is of another class, or has a part that ours lacks.
  """
  name = architecture(values)
  if name == OWN:
    return dicts.from_dict(config_lib.ModelConfig, values['model'], 'model.')
  given = DEFAULTS | OF_CLASS[name] | dict(values)
  for key, ours in REQUIRED.items():
    if key in given and given[key] != ours:
      raise ValueError(
        f'{key}={given[key]!r} of a {name} is not in this model, which has '
        f'{key}={ours!r} alone'
      )
  layers = given.get('layer_types') or []
  if other := [kind for kind in layers if kind != 'full_attention']:
    raise ValueError(
      f'layer_types has {other[0]!r}: this model attends to all tokens before'
    )
  if (given.get('partial_rotary_factor') or 1) != 1:
    raise ValueError(
      f'partial_rotary_factor={given["partial_rotary_factor"]} is not read: '
      f'{name} has it at 1'
    )
  make = _latent if name == DEEPSEEK else _grouped
  dtype = given.get('dtype') or given.get('torch_dtype')
  return config_lib.ModelConfig(
    vocab_size=given['vocab_size'],
    num_blocks=given['num_hidden_layers'],
    dim=given['hidden_size'],
    ffn_dim=given['intermediate_size'],
    norm_eps=float(given['rms_norm_eps']),
    tied_embeddings=given['tie_word_embeddings'],
    dtype='bfloat16' if dtype == 'bfloat16' else 'float32',
    connection=config_lib.ConnectionConfig('residual'),
    **make(name, given),
  )


def _grouped(name, given):
  heads = given['num_attention_heads']
  attention = config_lib.AttentionConfig(
    kind='gqa',
    num_heads=heads,
    num_kv_heads=given.get('num_key_value_heads') or heads,
    head_dim=given.get('head_dim') or given['hidden_size'] // heads,
    rope_dim=0,
    qkv_bias=name == QWEN2,
    qk_norm=name == QWEN3,
    **_rope(given, latent=False),
  )
  return {'attention': attention}


def _latent(name, given):
  heads, size = given['num_attention_heads'], given['qk_nope_head_dim']
  for key, ours in (('v_head_dim', size), ('num_key_value_heads', heads)):
    if (given.get(key) or ours) != ours:
      raise ValueError(
        f'{key}={given[key]} of a {name} must be {ours} in this model, as its '
        'keys have it'
      )
  attention = config_lib.AttentionConfig(
    num_heads=heads,
    head_dim=size,
    rope_dim=given['qk_rope_head_dim'],
    kv_rank=given['kv_lora_rank'],
    query_rank=given['q_lora_rank'] or 0,
    latent_norm_eps=INNER_EPS,
    **_rope(given, latent=True),
  )
  dense = given['first_k_dense_replace']
  if dense >= given['num_hidden_layers']:
    return {'attention': attention}
  moe = config_lib.MoEConfig(
    num_experts=given['n_routed_experts'],
    experts_per_token=given['num_experts_per_tok'],
    num_shared=given['n_shared_experts'] or 0,
    expert_dim=given['moe_intermediate_size'],
    num_dense_blocks=dense,
    num_groups=given['n_group'],
    groups_per_token=given['topk_group'],
    normalize_gates=given['norm_topk_prob'],
    gate_scale=float(given['routed_scaling_factor']),
  )
  return {'attention': attention, 'moe': moe}


def _rope(given, latent):
  """theta and the scaling, in the form of version 4 or 5."""
  values = dict(given.get('rope_scaling') or given.get('rope_parameters') or {})
  theta = float(values.pop('rope_theta', given['rope_theta']))
  kind = values.pop('rope_type', None) or values.pop('type', None) or 'default'
  values.pop('type', None)
  if kind == 'default':
    return {'rope_theta': theta}
  length = given.get('original_max_position_embeddings') or values.pop(
    'original_max_position_embeddings', given['max_position_embeddings']
  )
  values.pop('original_max_position_embeddings', None)
  names = {
    'linear': dict(factor='factor'),
    'llama3': dict(
      factor='factor', low_freq='low_freq_factor', high_freq='high_freq_factor'
    ),
    'yarn': {
      name: name for name in ('factor', 'beta_fast', 'beta_slow', 'mscale')
    }
    | {'mscale_all_dim': 'mscale_all_dim'},
  }.get(kind)
  if names is None:
    raise ValueError(
      f'rope_scaling of the type {kind!r} is not in this model, which has '
      'linear, llama3 and yarn'
    )
  found = {
    ours: float(values.pop(theirs))
    for ours, theirs in names.items()
    if values.get(theirs) is not None
  }
  if kind == 'yarn':
    # Without both, the length is m(1): as with mscale=1, mscale_all_dim=0.
    one, both = found.get('mscale'), found.get('mscale_all_dim')
    if not (one and both):
      found['mscale'], found['mscale_all_dim'] = 1.0, both or 0.0
    if both and not (one and latent):
      raise ValueError(
        f'rope_scaling.mscale_all_dim={both} with mscale={one} is not read: '
        'both are read of DeepseekV3ForCausalLM'
      )
  values = {n: v for n, v in values.items() if v not in (None, True)}
  scaling = config_lib.RopeScalingConfig(
    kind, **found, original_length=0 if kind == 'linear' else int(length)
  )
  attention_factor = values.pop('attention_factor', None)
  ours = rope.lengthening(config_lib.AttentionConfig(rope_scaling=scaling))
  if attention_factor is not None and not math.isclose(attention_factor, ours):
    raise ValueError(
      f'rope_scaling.attention_factor={attention_factor} is not read: here it '
      f'is {ours:.6g}, by the other settings'
    )
  if values:
    name = min(values)
    raise ValueError(
      f'rope_scaling.{name}={values[name]!r} of the type {kind!r} is not read'
    )
  return {'rope_theta': theta, 'rope_scaling': scaling}


def to_config(
  model: config_lib.ModelConfig, length: int, ends: tuple[int, int] | None
) -> dict[str, Any]:
  """The config.json of a plain model, in the form that versions 4 and 5 read.

  Args:
    model: of kind='residual', 'mhc' or 'identity', without adapters.
    length: tokens of the rows that it was trained on.
    ends: the tokens that begin and end a document, if they are known.

  Raises:
    ValueError: none of the classes is this model.
  """
  c, moe = model.attention, model.moe
  if c.value_residual:
    raise ValueError(
      "attention.value_residual=True is in none of transformers' classes, nor "
      f'in {CODE}'
    )
  values: dict[str, Any] = {
    'vocab_size': model.vocab_size,
    'num_hidden_layers': model.num_blocks,
    'hidden_size': model.dim,
    'max_position_embeddings': length,
    'torch_dtype': 'float32',
  }
  if ends is not None:
    values |= {'bos_token_id': ends[0], 'eos_token_id': ends[1]}
  if model.connection.kind != 'residual':
    return _own_values(model) | values
  values |= {
    'intermediate_size': model.ffn_dim,
    'rms_norm_eps': model.norm_eps,
    'tie_word_embeddings': model.tied_embeddings,
    'hidden_act': 'silu',
    'num_attention_heads': c.num_heads,
    'rope_theta': c.rope_theta,
    'rope_scaling': _scaling(c),
    'attention_bias': False,
  }
  if c.kind == 'mla':
    name, own = DEEPSEEK, _latent_values(model)
  else:
    if moe.num_experts:
      raise ValueError(
        "attention.kind='gqa' with experts is none of the classes that are "
        f'written: {", ".join(OF_CLASS)}; without experts, or latent, it is'
      )
    name, own = _grouped_class(c), _grouped_values(model)
  kind = next(key for key, value in TYPES.items() if value == name)
  values = {'architectures': [name], 'model_type': kind} | values | own
  # Only what is read back as the same model is written.
  back = of_config(values)
  eps = back.attention.latent_norm_eps
  same = dataclasses.replace(model.attention, latent_norm_eps=eps)
  if found := body.difference(dataclasses.replace(model, attention=same), back):
    raise ValueError(f'{name} does not have {found}')
  return values


def _own_values(model):
  c = model.connection
  parts = {name: getattr(c, name) for name in ('pre', 'post', 'res')}
  if c.kind not in ('mhc', 'identity'):
    raise ValueError(
      f"connection.kind={c.kind!r} is in none of transformers' classes, nor in "
      f"{CODE}: only 'residual', 'mhc' and 'identity' are"
    )
  for name, part in parts.items():
    if part != 'dynamic':
      raise ValueError(
        f"connection.{name}={part!r} is not in {CODE}: only 'dynamic' is"
      )
  module = CODE.removesuffix('.py')
  return {
    'architectures': [OWN],
    'model_type': 'mhc',
    'auto_map': {
      'AutoConfig': f'{module}.MhcConfig',
      'AutoModelForCausalLM': f'{module}.{OWN}',
    },
    'model': dicts.to_dict(model),
  }


def _grouped_class(c):
  if c.qk_norm and c.qkv_bias:
    raise ValueError(
      'attention.qk_norm with attention.qkv_bias is none of the classes that '
      'are written: Qwen2 has the biases, Qwen3 the norms'
    )
  return QWEN3 if c.qk_norm else QWEN2 if c.qkv_bias else LLAMA


def _grouped_values(model):
  c = model.attention
  if model.dim % c.num_heads:
    raise ValueError(
      f'attention.num_heads={c.num_heads} must divide model.dim={model.dim} '
      "for transformers' classes"
    )
  return {
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'mlp_bias': False,
    'use_sliding_window': False,
  }


def _latent_values(model):
  c, moe = model.attention, model.moe
  eps = c.latent_norm_eps or model.norm_eps
  if eps > INNER_EPS:
    raise ValueError(
      f'the norms of latent vectors have the eps {eps}, of which at most '
      f'{INNER_EPS} can be written: DeepseekV3ForCausalLM has a fixed one'
    )
  values = {
    'num_key_value_heads': c.num_heads,
    'qk_nope_head_dim': c.head_dim,
    'v_head_dim': c.head_dim,
    'qk_rope_head_dim': c.rope_dim,
    'kv_lora_rank': c.kv_rank,
    'q_lora_rank': c.query_rank or None,
    'rope_interleave': True,
    'first_k_dense_replace': model.num_blocks - model.num_moe_blocks,
  }
  if not moe.num_experts:
    return values
  return values | {
    'n_routed_experts': moe.num_experts,
    'num_experts_per_tok': moe.experts_per_token,
    'n_shared_experts': moe.num_shared,
    'moe_intermediate_size': moe.expert_dim,
    'n_group': moe.num_groups,
    'topk_group': moe.groups_per_token,
    'norm_topk_prob': moe.normalize_gates,
    'routed_scaling_factor': moe.gate_scale,
  }


def _scaling(c):
  s = c.rope_scaling
  if s.kind == 'none':
    return None
  values = {'rope_type': s.kind, 'factor': s.factor}
  if s.kind != 'linear':
    values['original_max_position_embeddings'] = s.original_length
  if s.kind == 'llama3':
    values |= {'low_freq_factor': s.low_freq, 'high_freq_factor': s.high_freq}
  if s.kind == 'yarn':
    values |= {'beta_fast': s.beta_fast, 'beta_slow': s.beta_slow}
    if s.mscale_all_dim:
      both = {'mscale': s.mscale, 'mscale_all_dim': s.mscale_all_dim}
      return values | both
    values['attention_factor'] = rope.lengthening(c)
  return values
