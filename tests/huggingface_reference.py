"""Llama, Qwen2, Qwen3 and DeepSeek-V3 of Hugging Face, in NumPy and float64.

`logits` computes what a folder's model does from its config.json and its
safetensors alone, by the formulas of transformers 5.24: models/llama, qwen2,
qwen3 and deepseek_v3, and modeling_rope_utils.py. `random_folder` writes such
folders. tests/slow/huggingface.py compares both with transformers itself.
"""

import json
import math
import pathlib

import numpy as np
from safetensors import numpy as safetensors_numpy

MODEL_TYPES = {
  'LlamaForCausalLM': 'llama',
  'Qwen2ForCausalLM': 'qwen2',
  'Qwen3ForCausalLM': 'qwen3',
  'DeepseekV3ForCausalLM': 'deepseek_v3',
}
EVERY = {
  'attention_dropout': 0.0,
  'bos_token_id': 0,
  'eos_token_id': 1,
  'hidden_act': 'silu',
  'hidden_size': 32,
  'initializer_range': 0.02,
  'intermediate_size': 48,
  'max_position_embeddings': 512,
  'num_attention_heads': 4,
  'num_hidden_layers': 3,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-6,
  'rope_scaling': None,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'use_cache': True,
  'vocab_size': 320,
}
WINDOW = {'use_sliding_window': False, 'sliding_window': None}
WINDOW['max_window_layers'] = 3
OWN = {
  'LlamaForCausalLM': {
    'attention_bias': False,
    'head_dim': 8,
    'mlp_bias': False,
    'pretraining_tp': 1,
  },
  'Qwen2ForCausalLM': WINDOW,
  'Qwen3ForCausalLM': {'attention_bias': False, 'head_dim': 8, **WINDOW},
  'DeepseekV3ForCausalLM': {
    'attention_bias': False,
    'first_k_dense_replace': 1,
    'kv_lora_rank': 16,
    'moe_intermediate_size': 24,
    'n_group': 4,
    'n_routed_experts': 8,
    'n_shared_experts': 1,
    'norm_topk_prob': True,
    'num_experts_per_tok': 2,
    'num_key_value_heads': 4,
    'num_nextn_predict_layers': 0,
    'pretraining_tp': 1,
    'q_lora_rank': None,
    'qk_nope_head_dim': 16,
    'qk_rope_head_dim': 8,
    'rope_interleave': True,
    'routed_scaling_factor': 2.5,
    'topk_group': 2,
    'v_head_dim': 16,
  },
}
# What transformers takes where a config.json is silent.
DEFAULTS = {
  'attention_bias': False,
  'hidden_act': 'silu',
  'mlp_bias': False,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
  'use_sliding_window': False,
}
OWN_DEFAULTS = {
  'LlamaForCausalLM': {'num_key_value_heads': None},
  'Qwen2ForCausalLM': {'num_key_value_heads': 32},
  'Qwen3ForCausalLM': {'num_key_value_heads': 32, 'head_dim': 128},
  'DeepseekV3ForCausalLM': {
    'first_k_dense_replace': 3,
    'n_group': 8,
    'n_shared_experts': 1,
    'norm_topk_prob': True,
    'num_experts_per_tok': 8,
    'q_lora_rank': 1536,
    'rope_interleave': True,
    'routed_scaling_factor': 2.5,
    'topk_group': 4,
  },
}
# The eps of DeepSeek's norms inside of attention, whatever rms_norm_eps is.
INNER_EPS = 1e-6


def random_folder(folder, architecture, seed=0, version=4, std=None, **changes):
  """Writes a tiny model with random weights, as transformers would save it.

  Args:
    folder: is made if it does not exist.
    architecture: a key of MODEL_TYPES.
    seed: of the weights.
    version: 4 or 5, the transformers whose form the config has: 5 says
      rope_parameters where 4 says rope_theta and rope_scaling.
    std: of matrices beside norms of 1, as transformers initialises a model (by
      0.02); by default weights are larger, and norms are not 1.
    **changes: fields of the config, in the form of version 4.
  """
  config = random_config(architecture, version, **changes)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(config, indent=2, sort_keys=True) + '\n'
  (folder / 'config.json').write_text(text)
  rng = np.random.default_rng(seed)
  tensors = {
    name: random_tensor(name, shape, rng, std).astype(np.float32)
    for name, shape in sorted(shapes(config).items())
  }
  safetensors_numpy.save_file(
    tensors, folder / 'model.safetensors', {'format': 'pt'}
  )


def random_config(architecture, version=4, **changes):
  """The config.json of a tiny model."""
  config = EVERY | OWN[architecture] | changes
  config['architectures'] = [architecture]
  config['model_type'] = MODEL_TYPES[architecture]
  if version == 4:
    return config | {'torch_dtype': 'float32', 'transformers_version': '4.57.1'}
  rope = config.pop('rope_scaling') or {}
  rope = {'rope_type': rope.get('type', 'default'), **rope}
  rope['rope_theta'] = config.pop('rope_theta')
  config['rope_parameters'] = rope
  return config | {'dtype': 'float32', 'transformers_version': '5.24.0'}


def random_tensor(name, shape, rng, std=None):
  """Weights of variance 1 / fan_in, norms near 1, small biases."""
  drawn = rng.standard_normal(shape)
  if std is not None:
    return std * drawn if len(shape) > 1 else np.ones(shape)
  if name.endswith('e_score_correction_bias'):
    return 0.1 * drawn
  if name.endswith('bias'):
    return 0.2 * drawn
  if len(shape) == 1:
    return 1 + 0.2 * drawn
  return drawn / math.sqrt(shape[-1])


def shapes(config):
  """The shape of every tensor by name, as transformers saves them."""
  config = completed(config)
  width, vocab = config['hidden_size'], config['vocab_size']
  found = {'model.embed_tokens': (vocab, width), 'model.norm': (width,)}
  if not config['tie_word_embeddings']:
    found['lm_head'] = (vocab, width)
  found = {f'{name}.weight': shape for name, shape in found.items()}
  for layer in range(config['num_hidden_layers']):
    for name, shape in block_shapes(config, layer).items():
      found[f'model.layers.{layer}.{name}'] = shape
  return found


def block_shapes(config, layer):
  """The shapes of one layer's tensors."""
  width = config['hidden_size']
  found = {
    'input_layernorm.weight': (width,),
    'post_attention_layernorm.weight': (width,),
  }
  latent = is_deepseek(config)
  parts = latent_attention_shapes if latent else attention_shapes
  for name, shape in parts(config).items():
    found[f'self_attn.{name}'] = shape
  sparse = latent and layer >= config['first_k_dense_replace']
  if not sparse:
    size = config['intermediate_size']
    return found | mlp_shapes('mlp', width, size, config['mlp_bias'])
  return found | moe_shapes(config)


def attention_shapes(config):
  """The tensors of attention with heads that share keys and values."""
  width, size = config['hidden_size'], head_size(config)
  heads, shared = (
    config[f'num_{of}_heads'] for of in ('attention', 'key_value')
  )
  rows = {'q': heads, 'k': shared, 'v': shared}
  found = {f'{n}_proj.weight': (m * size, width) for n, m in rows.items()}
  found['o_proj.weight'] = (width, heads * size)
  biased = config['attention_bias']
  if biased or config['architectures'] == ['Qwen2ForCausalLM']:
    found |= {f'{n}_proj.bias': (m * size,) for n, m in rows.items()}
  if biased:
    found['o_proj.bias'] = (width,)
  if config['architectures'] == ['Qwen3ForCausalLM']:
    found |= {'q_norm.weight': (size,), 'k_norm.weight': (size,)}
  return found


def latent_attention_shapes(config):
  """The tensors of DeepSeek's attention."""
  width, heads = config['hidden_size'], config['num_attention_heads']
  query, latent = config['q_lora_rank'], config['kv_lora_rank']
  nope, turned = config['qk_nope_head_dim'], config['qk_rope_head_dim']
  value = config['v_head_dim']
  found = {
    'kv_a_proj_with_mqa.weight': (latent + turned, width),
    'kv_a_layernorm.weight': (latent,),
    'kv_b_proj.weight': (heads * (nope + value), latent),
    'o_proj.weight': (width, heads * value),
  }
  if query is None:
    found['q_proj.weight'] = (heads * (nope + turned), width)
  else:
    found['q_a_proj.weight'] = (query, width)
    found['q_a_layernorm.weight'] = (query,)
    found['q_b_proj.weight'] = (heads * (nope + turned), query)
  if config['attention_bias']:
    for name in {'q_a_proj', 'kv_a_proj_with_mqa', 'o_proj'}:
      if (weight := found.get(f'{name}.weight')) is not None:
        found[f'{name}.bias'] = weight[:1]
  return found


def mlp_shapes(name, width, size, bias=False):
  """The tensors of a gated layer of some size."""
  found = {
    f'{name}.gate_proj.weight': (size, width),
    f'{name}.up_proj.weight': (size, width),
    f'{name}.down_proj.weight': (width, size),
  }
  if bias:
    found |= {
      key.replace('weight', 'bias'): shape[:1] for key, shape in found.items()
    }
  return found


def moe_shapes(config):
  """The tensors of a router, its experts and the shared ones, as one layer."""
  width, size = config['hidden_size'], config['moe_intermediate_size']
  number = config['n_routed_experts']
  found = {
    'mlp.gate.weight': (number, width),
    'mlp.gate.e_score_correction_bias': (number,),
  }
  for expert in range(number):
    found |= mlp_shapes(f'mlp.experts.{expert}', width, size)
  size *= config['n_shared_experts']
  return found | mlp_shapes('mlp.shared_experts', width, size)


def logits(folder, tokens):
  """The logits [b, t, v] of tokens [b, t] by the model of a folder."""
  config, tensors = read(folder)
  eps, rope = config['rms_norm_eps'], rotation(config, tokens.shape[1])
  head = embedding = tensors['model.embed_tokens.weight']
  x = embedding[tokens]
  for layer in range(config['num_hidden_layers']):
    block = part(tensors, f'model.layers.{layer}')
    attend = latent_attention if is_deepseek(config) else attention
    normed = rms_norm(x, block['input_layernorm.weight'], eps)
    x = x + attend(normed, part(block, 'self_attn'), config, rope)
    normed = rms_norm(x, block['post_attention_layernorm.weight'], eps)
    feed = moe if 'mlp.gate.weight' in block else mlp
    x = x + feed(normed, part(block, 'mlp'), config)
  x = rms_norm(x, tensors['model.norm.weight'], eps)
  if not config['tie_word_embeddings'] or 'lm_head.weight' in tensors:
    head = tensors['lm_head.weight']  # transformers 5 ties none that differ
  return x @ head.T


def read(folder):
  """The config of a folder, with defaults, and its tensors by name."""
  folder = pathlib.Path(folder)
  config = completed(json.loads((folder / 'config.json').read_text()))
  check(config)
  tensors = {}
  for file in sorted(folder.glob('*.safetensors')):
    tensors |= read_tensors(file)
  return config, tensors


def read_tensors(file):
  """The tensors of a safetensors file, bfloat16 or not, as float64."""
  data = file.read_bytes()
  start = 8 + int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:start])
  header.pop('__metadata__', None)
  return {
    name: numbers(data[start:][slice(*one['data_offsets'])], one['dtype'])
    .astype(np.float64)
    .reshape(one['shape'])
    for name, one in header.items()
  }


def numbers(data, dtype):
  """The numbers that bytes are, of a type of safetensors."""
  if dtype == 'BF16':
    return (np.frombuffer(data, '<u2').astype('<u4') << 16).view('<f4')
  return np.frombuffer(data, {'F64': '<f8', 'F32': '<f4', 'F16': '<f2'}[dtype])


def completed(config):
  """A config with what transformers takes where it is silent."""
  (architecture,) = config['architectures']
  config = DEFAULTS | OWN_DEFAULTS[architecture] | config
  if config['num_key_value_heads'] is None:
    config['num_key_value_heads'] = config['num_attention_heads']
  return config


def check(config):
  """Refuses what the formulas here are not for."""
  windows = {*(config.get('layer_types') or [])} - {'full_attention'}
  if config['use_sliding_window'] or windows:
    raise ValueError('sliding windows are not implemented')
  if config['hidden_act'] != 'silu':
    raise ValueError(f'hidden_act={config["hidden_act"]!r} is not implemented')


def is_deepseek(config):
  """Whether the attention is latent, and layers may be sparse."""
  return config['architectures'] == ['DeepseekV3ForCausalLM']


def part(tensors, prefix):
  """The tensors below a name, by the rest of theirs."""
  prefix += '.'
  return {
    name.removeprefix(prefix): tensor
    for name, tensor in tensors.items()
    if name.startswith(prefix)
  }


def rms_norm(x, weight, eps):
  return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def linear(x, tensors, name):
  """The product with a weight [out, in], plus the bias if there is one."""
  return x @ tensors[f'{name}.weight'].T + tensors.get(f'{name}.bias', 0.0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  x = np.exp(x - np.max(x, axis=-1, keepdims=True))
  return x / np.sum(x, axis=-1, keepdims=True)


def mlp(x, tensors, config):
  """The gated layer; `config` is not needed, but of every such function."""
  del config
  gate = linear(x, tensors, 'gate_proj')
  up = linear(x, tensors, 'up_proj')
  return linear(gate * sigmoid(gate) * up, tensors, 'down_proj')


def moe(x, tensors, config):
  """The experts that each token chose, weighted, and the shared ones."""
  weights = routing(x, part(tensors, 'gate'), config)
  total = mlp(x, part(tensors, 'shared_experts'), config)
  for expert in range(config['n_routed_experts']):
    result = mlp(x, part(tensors, f'experts.{expert}'), config)
    total = total + weights[..., expert, None] * result
  return total


def routing(x, gate, config):
  """The weight [..., e] of every expert: 0 for those that are not chosen."""
  scores = sigmoid(x @ gate['weight'].T)
  choice = scores + gate['e_score_correction_bias']
  choice = np.where(allowed(choice, config), choice, -np.inf)
  chosen = largest(choice, config['num_experts_per_tok'])
  weights = np.where(chosen, scores, 0.0)
  if config['norm_topk_prob']:
    weights = weights / (np.sum(weights, axis=-1, keepdims=True) + 1e-20)
  return weights * config['routed_scaling_factor']


def allowed(choice, config):
  """Which experts [..., e] stand in the best groups, by their best two."""
  number = config['n_group']
  groups = choice.reshape(*choice.shape[:-1], number, -1)
  best = np.sum(np.sort(groups, axis=-1)[..., -2:], axis=-1)
  kept = largest(best, config['topk_group'])
  return np.repeat(kept, choice.shape[-1] // number, axis=-1)


def largest(x, number):
  """Which entries of the last axis are its `number` largest."""
  order = np.argsort(-x, axis=-1, kind='stable')[..., :number]
  found = np.zeros(x.shape, bool)
  np.put_along_axis(found, order, True, axis=-1)
  return found


def attention(x, tensors, config, rope):
  """The attention of Llama, Qwen2 and Qwen3."""
  size = head_size(config)
  queries, keys, values = (
    heads(linear(x, tensors, f'{name}_proj'), size) for name in 'qkv'
  )
  if 'q_norm.weight' in tensors:
    eps = config['rms_norm_eps']
    queries = rms_norm(queries, tensors['q_norm.weight'], eps)
    keys = rms_norm(keys, tensors['k_norm.weight'], eps)
  queries, keys = rotated(queries, rope), rotated(keys, rope)
  repeats = queries.shape[1] // keys.shape[1]
  keys, values = (np.repeat(one, repeats, axis=1) for one in (keys, values))
  return linear(attended(queries, keys, values, size**-0.5), tensors, 'o_proj')


def latent_attention(x, tensors, config, rope):
  """The attention of DeepSeek, whose keys and values have a low rank."""
  nope, turned = config['qk_nope_head_dim'], config['qk_rope_head_dim']
  interleaved, rank = config['rope_interleave'], config['kv_lora_rank']
  queries = heads(latent_queries(x, tensors, config), nope + turned)
  latent = linear(x, tensors, 'kv_a_proj_with_mqa')
  latent, key = latent[..., :rank], latent[:, None, :, rank:]
  latent = rms_norm(latent, tensors['kv_a_layernorm.weight'], INNER_EPS)
  both = heads(
    linear(latent, tensors, 'kv_b_proj'), nope + config['v_head_dim']
  )
  key = np.broadcast_to(
    rotated(key, rope, interleaved), (*both.shape[:-1], turned)
  )
  keys = np.concatenate([both[..., :nope], key], axis=-1)
  queries = np.concatenate(
    [queries[..., :nope], rotated(queries[..., nope:], rope, interleaved)],
    axis=-1,
  )
  scale = latent_scale(config)
  return linear(
    attended(queries, keys, both[..., nope:], scale), tensors, 'o_proj'
  )


def latent_queries(x, tensors, config):
  """DeepSeek's queries, of a low rank if there is one."""
  if config['q_lora_rank'] is None:
    return linear(x, tensors, 'q_proj')
  low = linear(x, tensors, 'q_a_proj')
  low = rms_norm(low, tensors['q_a_layernorm.weight'], INNER_EPS)
  return linear(low, tensors, 'q_b_proj')


def latent_scale(config):
  """The factor before DeepSeek's softmax, which a scaled rope changes."""
  scale = (config['qk_nope_head_dim'] + config['qk_rope_head_dim']) ** -0.5
  rope = rope_parameters(config)
  if rope['rope_type'] != 'default' and rope.get('mscale_all_dim'):
    scale *= mscale(rope['factor'], rope['mscale_all_dim']) ** 2
  return scale


def heads(x, size):
  """Splits [b, t, heads size] to [b, heads, t, size]."""
  return np.swapaxes(x.reshape(*x.shape[:2], -1, size), 1, 2)


def attended(queries, keys, values, scale):
  """Causal attention; [b, heads, t, size] becomes [b, t, heads size]."""
  scores = queries @ np.swapaxes(keys, -1, -2) * scale
  length = scores.shape[-1]
  scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
  mixed = np.swapaxes(softmax(scores) @ values, 1, 2)
  return mixed.reshape(*mixed.shape[:2], -1)


def head_size(config):
  """The size of a head: by default all heads together are as wide as x."""
  given = config.get('head_dim')
  return given or config['hidden_size'] // config['num_attention_heads']


def rotated(x, rope, interleaved=False):
  """Turns pairs of x [..., t, size], which are halves apart or neighbours.

  What turned neighbours become stands in halves, as in transformers: only
  products of queries and keys matter, whose order is the same.
  """
  cosine, sine = rope
  a, b = np.split(x, 2, axis=-1)
  if interleaved:
    a, b = x[..., ::2], x[..., 1::2]
  return np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)


def rotation(config, length):
  """Cosines and sines [t, size / 2] of every position."""
  frequency, factor = frequencies(config)
  angle = np.arange(length)[:, None] * frequency
  return factor * np.cos(angle), factor * np.sin(angle)


def rope_parameters(config):
  """What a config says of rope, in either of the two forms."""
  found = config.get('rope_scaling') or config.get('rope_parameters') or {}
  theta = config.get('rope_theta', 10000.0)
  kind = found.get('type', 'default')
  found = {'rope_type': kind, 'rope_theta': theta, **found}
  length = 'original_max_position_embeddings'
  found.setdefault(length, config['max_position_embeddings'])
  if length in config:  # which goes before that of the group
    found[length] = config[length]
  return found


def frequencies(config):
  """The frequencies [size / 2] and the factor of cosines and sines."""
  rope = rope_parameters(config)
  size = (
    config['qk_rope_head_dim'] if is_deepseek(config) else head_size(config)
  )
  plain = rope['rope_theta'] ** (-np.arange(0, size, 2) / size)
  scaled = {
    'default': default_rope,
    'linear': linear_rope,
    'llama3': llama3_rope,
    'yarn': yarn_rope,
  }
  return scaled[rope['rope_type']](plain, rope)


def default_rope(plain, rope):
  del rope
  return plain, 1.0


def linear_rope(plain, rope):
  return plain / rope['factor'], 1.0


def llama3_rope(plain, rope):
  """Slow frequencies are divided, fast ones kept, and those between mixed."""
  low, high = rope['low_freq_factor'], rope['high_freq_factor']
  turns = rope['original_max_position_embeddings'] * plain / (2 * math.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return plain * (kept + (1 - kept) / rope['factor']), 1.0


def yarn_rope(plain, rope):
  """As of llama3, but the mixture is linear in the index of the frequency."""
  factor = rope['factor']
  low = yarn_index(rope.get('beta_fast') or 32, plain, rope)
  high = yarn_index(rope.get('beta_slow') or 1, plain, rope)
  if rope.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * len(plain) - 1)
  if low == high:
    high += 0.001
  divided = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
  return plain * (1 - divided + divided / factor), yarn_factor(rope)


def yarn_index(turns, plain, rope):
  """Which frequency makes so many turns within the original length."""
  ratio = rope['original_max_position_embeddings'] / (turns * 2 * math.pi)
  return len(plain) * math.log(ratio) / math.log(rope['rope_theta'])


def yarn_factor(rope):
  """The factor of cosines and sines."""
  if rope.get('attention_factor') is not None:
    return rope['attention_factor']
  factor, own, all_ = (
    rope.get(key) for key in ('factor', 'mscale', 'mscale_all_dim')
  )
  if own and all_:
    return mscale(factor, own) / mscale(factor, all_)
  return mscale(factor)


def mscale(factor, weight=1.0):
  """By how much attention is sharpened in a context that is longer."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1
