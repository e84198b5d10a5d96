"""Settings: the frozen list, the round trip, and one clear line on mistakes."""

import dataclasses
import json

import pytest

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import dicts

LEAVES = """
checkpoint_every
data.batch_size
data.block_rows
data.microbatch_size
data.mixture
data.on_damage
data.path
data.read_ahead
data.seq_len
data.task.levels
data.task.name
data.task.questions
data.task.size
data.text_field
data.token_dtype
data_seed
eval_every
eval_sequences
final_sequences
guards.cosine_bound
guards.gain
guards.gain_bound
guards.growth_bound
guards.loss_spike
guards.max_rollbacks
guards.max_skips
guards.nonfinite
guards.rollback_rate
guards.sinkhorn
guards.sinkhorn_bound
guards.spike_score
guards.spike_window
guards.streams
keep_checkpoints
keep_every
mesh.chunks
mesh.expert
mesh.head
mesh.keep
mesh.num_devices
mesh.num_sub_batches
mesh.overlap
mesh.pipe
mesh.schedule
model.adapter_rank
model.attention.head_dim
model.attention.implementation
model.attention.kind
model.attention.kv_rank
model.attention.latent_norm_eps
model.attention.num_heads
model.attention.num_kv_heads
model.attention.qk_norm
model.attention.qkv_bias
model.attention.query_rank
model.attention.rope_dim
model.attention.rope_scaling.beta_fast
model.attention.rope_scaling.beta_slow
model.attention.rope_scaling.factor
model.attention.rope_scaling.high_freq
model.attention.rope_scaling.kind
model.attention.rope_scaling.low_freq
model.attention.rope_scaling.mscale
model.attention.rope_scaling.mscale_all_dim
model.attention.rope_scaling.original_length
model.attention.rope_theta
model.attention.value_residual
model.connection.collapse
model.connection.depth_heads
model.connection.expand_scale
model.connection.go_size
model.connection.implementation
model.connection.init
model.connection.kind
model.connection.num_streams
model.connection.post
model.connection.pre
model.connection.res
model.connection.res_diagonal
model.connection.sinkhorn_backward
model.connection.sinkhorn_eps
model.connection.sinkhorn_iters
model.connection.sinkhorn_method
model.dim
model.dtype
model.ffn_dim
model.moe.balance_loss
model.moe.bias_speed
model.moe.buffer_factor
model.moe.capacity_factor
model.moe.dispatch
model.moe.expert_dim
model.moe.experts_per_token
model.moe.gate_scale
model.moe.groups_per_token
model.moe.normalize_gates
model.moe.num_dense_blocks
model.moe.num_experts
model.moe.num_groups
model.moe.num_shared
model.moe.router
model.moe.transport
model.norm_eps
model.num_blocks
model.recompute
model.recompute_every
model.tied_embeddings
model.vocab_size
num_steps
optimizer.b1
optimizer.b2
optimizer.clip_norm
optimizer.connection_rate
optimizer.decay_factors
optimizer.decay_points
optimizer.eps
optimizer.learning_rate
optimizer.muon
optimizer.muon_momentum
optimizer.name
optimizer.schedule
optimizer.trained
optimizer.warmup_steps
optimizer.weight_decay
probe_every
probe_sequences
seed
start_from
start_moments
tensorboard
wandb
watchdog_s
"""


def test_the_settings_are_these():
  """A new setting is a visible change."""
  assert sorted(dicts.leaves(config.Config())) == LEAVES.split()


@pytest.mark.parametrize('cls', [config.Config, comparison_lib.Comparison])
def test_json_round_trip(cls):
  value = cls()
  text = json.dumps(dicts.to_dict(value))
  assert dicts.from_dict(cls, json.loads(text)) == value


def test_an_int_passes_for_a_float():
  rate = dicts.from_dict(config.OptimizerConfig, {'learning_rate': 1})
  assert isinstance(rate.learning_rate, float)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'num_step': 3}, "'num_step'.*did you mean 'num_steps'"),
    ({'model': {'dims': 3}}, "'model.dims'.*did you mean 'model.dim'"),
    ({'model': 3}, 'model=3 must be a group'),
    (
      {'model': {'connection': {'num_streams': 0}}},
      'num_streams=0.*at least 1',
    ),
    ({'model': {'connection': {'kind': 'mch'}}}, "'mch'.*did you mean 'mhc'"),
    ({'model': {'connection': {'sinkhorn_eps': 0.5}}}, 'sinkhorn_eps=0.5'),
    (
      {'model': {'connection': {'kind': 'mhc_lite', 'num_streams': 6}}},
      'num_streams=6 is too many for mhc_lite',
    ),
    (
      {'model': {'connection': {'kind': 'kromhc', 'num_streams': 6}}},
      'num_streams=6 must be a power of two',
    ),
    (
      {
        'model': {
          'connection': {'kind': 'mhc_single_pass', 'collapse': 'learned'}
        }
      },
      "collapse='learned' would not be used",
    ),
    (
      {'model': {'connection': {'init': 'authors'}}},
      "init='authors' would not be used.*kind='mhc'",
    ),
    (
      {'model': {'connection': {'pre': 'of'}}},
      "connection.pre='of' must be.*did you mean 'off'",
    ),
    (
      {'model': {'connection': {'kind': 'identity', 'res': 'static'}}},
      "res='static' would not be used.*kind='identity'.*leave res='dynamic'",
    ),
    (
      {'model': {'connection': {'kind': 'residual', 'post': 'static'}}},
      "post='static' would not be used.*kind='residual'",
    ),
    (
      {'model': {'connection': {'kind': 'residual', 'expand_scale': 'random'}}},
      "expand_scale='random' would not be used.*kind='residual'",
    ),
    (
      {'model': {'connection': {'kind': 'hc', 'pre': 'off'}}},
      "pre='off' reads all streams alike.*set connection.expand_scale='random'",
    ),
    (
      {'model': {'connection': {'post': 'off'}}},
      "post='off' writes the same.*set connection.expand_scale='random'",
    ),
    (
      {'model': {'connection': {'kind': 'hc', 'post': 'off', 'res': 'off'}}},
      "post='off' writes the same",
    ),
    (
      {'model': {'moe': {'num_experts': 4, 'experts_per_token': 5}}},
      'experts_per_token=5 is more than moe.num_experts=4',
    ),
    ({'model': {'moe': {'capacity_factor': 0.0}}}, 'capacity_factor=0.0'),
    (
      {'model': {'num_blocks': 1, 'moe': {'num_experts': 4}}},
      'num_dense_blocks=1 leaves no block',
    ),
    ({'model': {'attention': {'rope_dim': 3}}}, 'rope_dim=3 must be even'),
    ({'model': {'recompute_every': 3}}, 'recompute_every=3 must be even'),
    ({'model': {'vocab_size': 257}}, 'vocab_size=257.*at least 258'),
    ({'num_steps': 'ten'}, "num_steps='ten' must be of type int"),
    ({'num_steps': True}, 'num_steps=True must be of type int'),
    ({'tensorboard': 1}, 'tensorboard=1 must be of type bool'),
    ({'optimizer': {'learning_rate': 0.0}}, 'learning_rate=0.0.*positive'),
    ({'optimizer': {'learning_rate': float('nan')}}, 'finite'),
    ({'optimizer': {'b2': 1.0}}, 'b2=1.0'),
    (
      {'optimizer': {'muon': 'deepseek_v4'}},
      "muon='deepseek_v4' would not be used.*set optimizer.name='muon'",
    ),
    ({'optimizer': {'decay_points': (0.5,)}}, 'equally many'),
    (
      {'optimizer': {'decay_points': (0.9, 0.8)}},
      r'decay_points=\(0.9, 0.8\) must rise',
    ),
    ({'num_steps': 20}, 'warmup_steps=30.*num_steps=20'),
    ({'probe_sequences': 0}, 'probe_sequences=0.*at least 1'),
    (
      {'probe_sequences': 5, 'eval_sequences': 4},
      'probe_sequences=5 are more than the eval_sequences=4',
    ),
    ({'keep_every': 300}, 'keep_every=300.*multiple of checkpoint_every=200'),
    (
      {'keep_every': 300, 'checkpoint_every': 0},
      'keep_every=300 keeps nothing with checkpoint_every=0',
    ),
    ({'data': {'seq_len': 1}}, 'seq_len=1.*at least 2'),
  ],
)
def test_mistakes_are_named(values, message):
  with pytest.raises(ValueError, match=message):
    dicts.from_dict(config.Config, values)


def test_the_plain_residual_has_one_stream():
  settings = config.ConnectionConfig(kind='residual', num_streams=4)
  assert settings.streams == 1
  assert dataclasses.replace(settings, kind='mhc').streams == 4


def test_ablations_in_which_streams_can_part_are_taken():
  for options in (
    dict(pre='off', post='off', res='off', expand_scale='random'),
    dict(pre='off', num_streams=1),  # nothing to part
    dict(kind='hc', post='off'),  # by rows of H_res that do not sum to one
    dict(kind='orthogonal', post='off', res='static'),
    dict(pre='static', post='static', res='off'),
  ):
    config.ConnectionConfig(**options)
