"""Models of Hugging Face's classes in and out, against the NumPy reference."""

import dataclasses
import json

from flax import nnx
import huggingface_reference as reference
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import saved_runs

from mhc import config
from mhc.config import dicts
from mhc.interop import huggingface
from mhc.interop.huggingface import settings
from mhc.interop.huggingface import tensors
from mhc.model import transformer
from mhc.training import export

LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'mscale': 0.7,
  'mscale_all_dim': 1.3,
}
QWEN_YARN = {'rope_type': 'yarn', 'factor': 4.0}
QWEN_YARN['original_max_position_embeddings'] = 16
CASES = {
  'llama': ('LlamaForCausalLM', dict(rms_norm_eps=1e-3)),
  'tied': ('LlamaForCausalLM', dict(tie_word_embeddings=True, head_dim=16)),
  'llama3': ('LlamaForCausalLM', dict(rope_scaling=LLAMA3, version=5)),
  'linear': (
    'LlamaForCausalLM',
    dict(rope_scaling={'rope_type': 'linear', 'factor': 4.0}),
  ),
  'qwen2': ('Qwen2ForCausalLM', dict(rope_scaling=QWEN_YARN)),
  'qwen3': ('Qwen3ForCausalLM', dict(rope_theta=1e6, head_dim=16)),
  'deepseek': ('DeepseekV3ForCausalLM', {}),
  'deepseek, all of it': (
    'DeepseekV3ForCausalLM',
    dict(
      q_lora_rank=12,
      rope_scaling=YARN,
      norm_topk_prob=False,
      rms_norm_eps=1e-2,
      rope_interleave=False,
      version=5,
    ),
  ),
  'deepseek, one group': (
    'DeepseekV3ForCausalLM',
    dict(n_group=1, topk_group=1, n_shared_experts=2),
  ),
}


def run(model, params, bias, tokens):
  graphdef, _ = transformer.abstract(model)
  merged = nnx.merge(graphdef, nnx.State(params))
  return np.asarray(nnx.jit(type(merged).__call__)(merged, tokens, bias))


def read(folder):
  return safetensors_numpy.load_file(folder / 'model.safetensors')


@pytest.mark.parametrize('case', CASES)
def test_its_logits_are_those_of_the_folder_and_it_goes_back(case, tmp_path):
  """To the last bit where the folder has interleaved pairs."""
  name, changes = CASES[case]
  reference.random_folder(tmp_path, name, **changes)
  model, params, bias = huggingface.load(tmp_path)
  tokens = np.random.default_rng(0).integers(320, size=(2, 40))
  want = reference.logits(tmp_path, tokens)
  got = run(model, params, bias, tokens.astype(np.int32))
  np.testing.assert_allclose(got, want, atol=1e-4)
  np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))

  (again := tmp_path / 'again').mkdir()
  values = settings.to_config(model, 512, (0, 1))
  tree = params | ({} if bias is None else {'router_bias': bias})
  huggingface.write(again, model, tree, values)
  back = huggingface.load(again)
  assert back[0] == model
  np.testing.assert_allclose(
    reference.logits(again, tokens), want, atol=1e-12 if bias is None else 1e-6
  )
  if 'rope_interleave' not in changes:
    before, after = read(tmp_path), read(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
      np.testing.assert_array_equal(after[key], tensor)


def test_half_precision_is_read_exactly(tmp_path):
  reference.random_folder(tmp_path, 'LlamaForCausalLM')
  wide = read(tmp_path)
  half = {name: t.astype(ml_dtypes.bfloat16) for name, t in wide.items()}
  safetensors_numpy.save_file(half, tmp_path / 'model.safetensors')
  _, params, _ = huggingface.load(tmp_path)
  np.testing.assert_array_equal(
    params['embed']['table'],
    half['model.embed_tokens.weight'].astype(np.float32),
  )


REFUSED = {
  'hidden_act': ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
  'windows': ({'use_sliding_window': True}, 'use_sliding_window=True'),
  'layers': ({'layer_types': ['sliding_attention']}, "'sliding_attention'"),
  'biases': ({'attention_bias': True}, 'attention_bias=True'),
  'mlp biases': ({'mlp_bias': True}, 'mlp_bias=True'),
  'class': ({'architectures': ['GPT2LMHeadModel']}, 'GPT2LMHeadModel is none'),
  'rope': ({'rope_scaling': {'type': 'dynamic'}}, "type 'dynamic' is not"),
  'rope value': (
    {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'short_factor': 3}},
    'rope_scaling.short_factor=3',
  ),
  'part': ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
  'small': ({'vocab_size': 100}, 'vocab_size=100 must be at least 258'),
  'another size': ({'vocab_size': 300}, r'must be float32 \[300, 32\]'),
  'deeper': ({'num_hidden_layers': 4}, r'layers.3.\S+, float32 .* is missing'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_our_model_lacks_is_named(case, tmp_path):
  changes, message = REFUSED[case]
  reference.random_folder(tmp_path, 'LlamaForCausalLM')
  file = tmp_path / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match=message) as caught:
    huggingface.load(tmp_path)
  assert '\n' not in str(caught.value)


def test_values_that_differ_from_keys_are_refused(tmp_path):
  reference.random_folder(tmp_path, 'DeepseekV3ForCausalLM', v_head_dim=8)
  with pytest.raises(ValueError, match='v_head_dim=8 of a Deepseek'):
    huggingface.load(tmp_path)


def test_an_unknown_tensor_and_another_head_are_refused(tmp_path):
  reference.random_folder(
    tmp_path, 'LlamaForCausalLM', tie_word_embeddings=True
  )
  found = read(tmp_path)
  for name in ('lm_head.weight', 'model.layers.0.self_attn.sinks'):
    more = found | {name: np.ones((320, 32), np.float32)}
    safetensors_numpy.save_file(more, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=name):
      huggingface.load(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'attention.num_heads': 3}, 'num_heads=3 must divide model.dim=64'),
    (
      {'attention.rope_dim': 8},
      'does not have model.attention.rope_dim=8, not 0',
    ),
    (
      {'attention.qk_norm': True, 'attention.qkv_bias': True},
      'qk_norm with attention.qkv_bias',
    ),
    ({'moe.num_experts': 4}, 'with experts is none of the classes'),
  ],
)
def test_what_no_class_is_cannot_be_written(changes, message):
  grouped = config.ModelConfig(
    attention=config.AttentionConfig(kind='gqa', rope_dim=0),
    connection=config.ConnectionConfig('residual'),
  )
  with pytest.raises(ValueError, match=message):
    settings.to_config(dicts.override(grouped, changes), 64, None)


@pytest.mark.parametrize('kind', ['mhc', 'identity'])
def test_models_with_streams_bring_their_code(kind, tmp_path):
  """tests/slow/huggingface.py runs it."""
  own, (_, state) = (
    tmp_path / 'own',
    saved_runs.save_run(
      tmp_path / 'run',
      dicts.replace(
        config.ModelConfig(),
        connection={'kind': kind, 'collapse': 'learned'},
        moe={'num_experts': 4, 'expert_dim': 8},
      ),
    ),
  )
  export.export(tmp_path / 'run', own, names_of='huggingface')
  assert (own / settings.CODE).read_text().startswith('"""Transformers with')
  model, params, bias = huggingface.load(own)
  assert model.connection.kind == kind
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  np.testing.assert_array_equal(bias, state.router_bias)
  found = read(own)
  assert 'layers.1.ffn.experts.3.down.weight' in found
  assert all(not name.startswith('layers.0.hc_') for name in found)
  # Modules of torch have these names.
  code = (own / settings.CODE).read_text()
  for name in {part for key in found for part in key.split('.')}:
    assert name.isdigit() or f'self.{name} ' in code or name == 'weight', name


def test_other_kinds_have_no_code():
  for changes, message in (
    ({'kind': 'hc'}, r"kind='hc' is in none of transformers' classes"),
    ({'post': 'static'}, "connection.post='static' is not in modeling_mhc.py"),
  ):
    model = dicts.replace(config.ModelConfig(), connection=changes)
    with pytest.raises(ValueError, match=message):
      settings.to_config(model, 64, None)


def test_rows_are_a_permutation():
  """That ours and theirs rotate the same numbers by the same angles."""
  latent = config.ModelConfig(connection=config.ConnectionConfig('residual'))
  parts = {part.name: part for part in tensors.tensors(latent)}
  rows = parts['model.layers.0.self_attn.kv_a_proj_with_mqa.weight'].rows
  assert rows[32:40] == (32, 40, 33, 41, 34, 42, 35, 43)
  assert sorted(rows) == [*range(48)]
  one = dataclasses.replace(latent.attention, query_rank=8)
  latent = dataclasses.replace(latent, attention=one)
  names = [part.name for part in tensors.tensors(latent)]
  assert 'model.layers.0.self_attn.q_b_proj.weight' in names


def test_a_run_is_exported(tmp_path):
  """As other code reads it; its adapters are added to the matrices."""
  out, plain_run = tmp_path / 'out', tmp_path / 'run'
  own = dataclasses.replace(config.ModelConfig().plain, adapter_rank=2)
  _, state = saved_runs.save_run(plain_run, own)
  step = export.export(plain_run, out, names_of='huggingface')
  assert huggingface.is_folder(out)
  assert step > 0
  values = json.loads((out / 'config.json').read_text())
  assert values['architectures'] == ['DeepseekV3ForCausalLM']
  model, params, bias = huggingface.load(out)
  tokens = jnp.asarray(np.random.default_rng(0).integers(256, size=(1, 16)))
  got = run(own, state.params, bias, tokens)
  np.testing.assert_allclose(
    run(model, params, bias, tokens), got, rtol=1e-4, atol=1e-3
  )
  np.testing.assert_allclose(
    reference.logits(out, np.asarray(tokens)), got, rtol=1e-4, atol=1e-3
  )
  with pytest.raises(ValueError, match='is not an empty folder'):
    export.export(plain_run, out, names_of='huggingface')
