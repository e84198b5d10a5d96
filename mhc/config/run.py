"""Every setting with its type and default, checked where it is made.

A `Config` is what one training run is. Files in configs/ are short diffs
against these defaults; `plain` converts them to and from nested dicts.
"""

import dataclasses
import typing
from typing import Literal

from mhc.config import checks
from mhc.pipeline import table as table_lib

Kind = Literal[
  'residual',
  'hc',
  'mhc',
  'identity',
  'mhc_lite',
  'kromhc',
  'orthogonal',
  'mhc_single_pass',
]
KINDS: tuple[str, ...] = typing.get_args(Kind)


@dataclasses.dataclass(frozen=True)
class ConnectionConfig:
  """The residual connection around every sub-layer."""

  kind: Kind = 'mhc'
  # n. The plain residual has one stream whatever is said here.
  num_streams: int = 4
  # How the streams become one before the last norm; 'mhc_single_pass' closes
  # them by the read weights of its last sub-layer instead.
  collapse: Literal['sum', 'mean', 'learned'] = 'mean'
  sinkhorn_iters: int = 20
  # 0 is the paper's Eq. 9, 1e-6 DeepSeek-V4's kernels.
  sinkhorn_eps: float = 0.0
  sinkhorn_backward: Literal['recompute', 'unrolled', 'implicit'] = 'recompute'
  # The passes over the streams: 'xla', the TPU kernels ('pallas', interpreted
  # elsewhere) or the GPU kernels ('triton'); 'auto' is the platform's fastest.
  implementation: Literal['auto', 'xla', 'pallas', 'triton'] = 'auto'

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(self, num_streams=1, sinkhorn_iters=1)
    if self.sinkhorn_eps and not 1e-12 <= self.sinkhorn_eps <= 1e-2:
      raise ValueError(
        f'connection.sinkhorn_eps={self.sinkhorn_eps} must be 0 (the paper) '
        'or from 1e-12 to 1e-2 (DeepSeek-V4: 1e-6)'
      )
    if self.kind == 'mhc_lite' and self.num_streams > 5:
      raise ValueError(
        f'connection.num_streams={self.num_streams} is too many for mhc_lite, '
        'which weighs all n! permutations: use at most 5'
      )
    if self.kind == 'kromhc' and self.num_streams & (self.num_streams - 1):
      raise ValueError(
        f'connection.num_streams={self.num_streams} must be a power of two for '
        'kromhc, a product of 2 x 2 matrices'
      )
    if self.kind == 'mhc_single_pass' and self.collapse == 'learned':
      raise ValueError(
        "connection.collapse='learned' would not be used: mhc_single_pass "
        'closes the streams by the read weights of its last sub-layer'
      )

  @property
  def streams(self) -> int:
    return 1 if self.kind == 'residual' else self.num_streams


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Multi-head latent attention (DeepSeek-V2)."""

  num_heads: int = 2
  head_dim: int = 32
  rope_dim: int = 16
  kv_rank: int = 32
  # Queries through a latent vector of this size (q-LoRA), 0 for directly.
  query_rank: int = 0
  rope_theta: float = 10_000.0

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(self, num_heads=1, head_dim=1, rope_dim=2, kv_rank=1)
    if self.rope_dim % 2:
      raise ValueError(
        f'attention.rope_dim={self.rope_dim} must be even: RoPE turns pairs'
      )
    checks.not_negative(self, 'query_rank')
    checks.at_least(self, rope_theta=1)  # else angles grow beyond float32


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Mixture of experts in place of the FFN, as in DeepSeek-V3; 0 for none."""

  num_experts: int = 0
  experts_per_token: int = 2
  num_shared: int = 1
  # Hidden width of one expert.
  expert_dim: int = 64
  # The first blocks keep a dense FFN of width ffn_dim.
  num_dense_blocks: int = 1
  # 'bias' chooses by affinity and a bias that evens the load, 'sinkhorn' by
  # affinities made doubly stochastic over tokens and experts, 'none' by
  # affinity alone, whatever the load.
  router: Literal['bias', 'sinkhorn', 'none'] = 'bias'
  bias_speed: float = 0.001
  # Weight of the sequence-wise auxiliary loss.
  balance_loss: float = 0.0
  dispatch: Literal['dropless', 'capacity'] = 'dropless'
  # Slots over the mean load, for dispatch='capacity'.
  capacity_factor: float = 1.25
  # How tokens reach experts on other devices: 'gather' sends every token to all
  # of them; 'ragged' and 'padded' to those of its experts, by ragged_all_to_all
  # (not on CPUs) or in buffers of one size. 'auto' is 'gather' for as many
  # devices as a token has experts, for more 'ragged' or, on CPUs, 'padded'.
  transport: Literal['auto', 'ragged', 'padded', 'gather'] = 'auto'
  # Rows of those buffers over the mean; what does not fit goes in another
  # round, nothing is lost.
  buffer_factor: float = 1.5

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(
      self,
      num_experts=0,
      experts_per_token=1,
      num_shared=0,
      expert_dim=1,
      num_dense_blocks=0,
    )
    checks.not_negative(self, 'bias_speed', 'balance_loss')
    checks.positive(self, 'capacity_factor', 'buffer_factor')
    if 0 < self.num_experts < self.experts_per_token:
      raise ValueError(
        f'moe.experts_per_token={self.experts_per_token} is more than '
        f'moe.num_experts={self.num_experts}'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A pre-norm transformer; a block is attention and FFN, two sub-layers."""

  # 256 bytes, two document marks, padded to a multiple of 64.
  vocab_size: int = 320
  num_blocks: int = 4
  dim: int = 64
  ffn_dim: int = 128
  norm_eps: float = 1e-20
  # Of streams and activations; parameters and mappings are always float32.
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  # What is computed again for the gradient, and once in how many sub-layers the
  # streams are kept (0: the paper's optimum), see recompute.py. Recomputing
  # whole blocks also saves time on a CPU, whose limit is the cache.
  recompute: Literal['none', 'mhc', 'mhc+block', 'full'] = 'full'
  recompute_every: int = 2
  attention: AttentionConfig = AttentionConfig()
  connection: ConnectionConfig = ConnectionConfig()
  moe: MoEConfig = MoEConfig()

  def __post_init__(self):
    checks.check_types(self)
    if self.moe.num_experts and self.moe.num_dense_blocks >= self.num_blocks:
      raise ValueError(
        f'moe.num_dense_blocks={self.moe.num_dense_blocks} leaves no block '
        f'with experts: model.num_blocks={self.num_blocks}'
      )
    checks.at_least(self, vocab_size=258, num_blocks=1, dim=1, ffn_dim=1)
    checks.not_negative(self, 'norm_eps', 'recompute_every')
    if self.recompute_every % 2:
      raise ValueError(
        f'model.recompute_every={self.recompute_every} must be even: a block '
        'has two sub-layers (0 for the optimum of the paper)'
      )

  @property
  def stack(self) -> str:
    """The stack of blocks that a pipeline is cut from."""
    return 'moe_blocks' if self.moe.num_experts else 'dense_blocks'

  @property
  def num_moe_blocks(self) -> int:
    if not self.moe.num_experts:
      return 0
    return self.num_blocks - self.moe.num_dense_blocks


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with the settings of the paper's Table 5, but for the rate."""

  # 'muon' orthogonalises the updates of matrices, as DeepSeek-V4 does;
  # embeddings, head, norms and the connections' biases and gates keep AdamW.
  name: Literal['adamw', 'muon'] = 'adamw'
  learning_rate: float = 3e-3
  warmup_steps: int = 30
  # 'step' multiplies the rate by decay_factors at decay_points, fractions of
  # the run; 'cosine' decays to 0; 'constant' does not decay.
  schedule: Literal['step', 'cosine', 'constant'] = 'step'
  decay_points: tuple[float, ...] = (0.8, 0.9)
  decay_factors: tuple[float, ...] = (0.316, 0.1)
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-20
  weight_decay: float = 0.1
  # Of the Nesterov momentum, for name='muon'.
  muon_momentum: float = 0.95
  # Bound on the global gradient norm, 0 for none. The paper gives none.
  clip_norm: float = 1.0

  def __post_init__(self):
    checks.check_types(self)
    checks.positive(self, 'learning_rate', 'eps')
    checks.not_negative(self, 'warmup_steps', 'weight_decay', 'clip_norm')
    for name in ('b1', 'b2', 'muon_momentum'):
      # What is nearer to 1 is 1 in float32.
      if not 0 <= getattr(self, name) <= 1 - 2**-24:
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be in [0, 1 - 2**-24]'
        )
    if len(self.decay_points) != len(self.decay_factors):
      raise ValueError(
        f'optimizer.decay_points={self.decay_points} and '
        f'decay_factors={self.decay_factors} must be equally many'
      )
    if list(self.decay_points) != sorted(self.decay_points) or not all(
      0 < point < 1 for point in self.decay_points
    ):
      raise ValueError(
        f'optimizer.decay_points={self.decay_points} must rise within (0, 1)'
      )
    if min(self.decay_factors, default=0) < 0:
      raise ValueError(
        f'optimizer.decay_factors={self.decay_factors} must not be negative'
      )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text, cut into rows of `seq_len` tokens."""

  # A file of text, JSON lines, Parquet or ArrayRecord, a folder of them or a
  # glob pattern, then read as bytes; a folder of tokens that
  # launch/prepare_data.py wrote; '' is the source code of the running Python's
  # standard library, about 10 MB.
  path: str = ''
  # A damaged record, file or block of tokens ends the run, or is left out and
  # counted.
  on_damage: Literal['stop', 'skip'] = 'stop'
  seq_len: int = 64
  batch_size: int = 8
  # Rows that a device takes at a time, 0 for its whole share of the batch.
  # Gradients are added up; what depends on the tokens taken together (capacity,
  # the Sinkhorn router) then does so within each such part.
  microbatch_size: int = 0

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(self, seq_len=2, batch_size=1, microbatch_size=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices, and what they split; none of it changes what is computed.

  `pipe` x `expert` x the rest, which with `expert` splits the batch and alone
  splits every other array of the training state.
  """

  # 0 takes the most that divide the batch.
  num_devices: int = 0
  # Devices that split the depth, a pipeline of stages.
  pipe: int = 1
  # Devices that split the experts of a layer.
  expert: int = 1
  # The order of the stages' work on microbatches, see schedule.py.
  schedule: table_lib.Name = 'interleaved'
  # Stages a device, for schedule='interleaved'; the other schedules fix it.
  chunks: int = 2
  # Parts of a microbatch that a block computes side by side: the tokens of one
  # travel to their experts while another is computed.
  parts: int = 1
  # Who computes the logits: the device of the last stage, or all, each of its
  # part of the vocabulary.
  head: table_lib.Head = 'last'
  # Tells the TPU's compiler to send while it computes, see compiler.py.
  overlap: bool = True

  def __post_init__(self):
    checks.check_types(self)
    checks.not_negative(self, 'num_devices')
    checks.at_least(self, pipe=1, expert=1, chunks=2, parts=1)
    if self.num_devices % (self.pipe * self.expert):
      raise ValueError(
        f'mesh.num_devices={self.num_devices} is not a multiple of '
        f'mesh.pipe={self.pipe} times mesh.expert={self.expert}'
      )


Policy = Literal['log', 'skip_step', 'rollback', 'stop']
# For what is seen between steps only, when there is no step to skip.
Between = Literal['log', 'rollback', 'stop']


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
  """What is watched (`guards`), and what to do about it.

  'log' writes an event, 'skip_step' does not make that update, 'rollback' goes
  on from the last checkpoint with the data after the trouble, and from the one
  before when that leads into trouble again, 'stop' ends.
  """

  nonfinite: Policy = 'skip_step'
  loss_spike: Policy = 'log'
  gain: Between = 'log'
  streams: Between = 'log'
  sinkhorn: Between = 'log'
  # Robust standard deviations above the median of as many steps.
  spike_score: float = 6.0
  spike_window: int = 32
  gain_bound: float = 10.0
  cosine_bound: float = 0.999
  growth_bound: float = 1e3
  # mHC's columns reach 1 under stress with the paper's 20 iterations.
  sinkhorn_bound: float = 1.5
  # More updates skipped in a row, or more rollbacks, end the run.
  max_skips: int = 10
  max_rollbacks: int = 8
  # What a rollback multiplies the learning rate by.
  rollback_rate: float = 1.0

  def __post_init__(self):
    checks.check_types(self)
    checks.positive(
      self,
      'spike_score',
      'gain_bound',
      'cosine_bound',
      'growth_bound',
      'sinkhorn_bound',
      'rollback_rate',
    )
    checks.at_least(self, spike_window=16, max_skips=0, max_rollbacks=0)
    if self.rollback_rate > 1:
      raise ValueError(
        f'guards.rollback_rate={self.rollback_rate} must be at most 1'
      )


@dataclasses.dataclass(frozen=True)
class Config:
  """One training run."""

  # Of the initial parameters and of the order of the data.
  seed: int = 0
  num_steps: int = 400
  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  guards: GuardsConfig = GuardsConfig()
  # Each `*_every` is in steps, 0 for only at the end.
  eval_every: int = 100
  eval_sequences: int = 256
  probe_every: int = 25
  checkpoint_every: int = 200
  # The newest ones stay, and those at multiples of keep_every (0: none).
  keep_checkpoints: int = 2
  keep_every: int = 0
  tensorboard: bool = False

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(self, num_steps=1, eval_sequences=1, keep_checkpoints=1)
    checks.not_negative(
      self,
      'seed',
      'eval_every',
      'probe_every',
      'checkpoint_every',
      'keep_every',
    )
    if self.keep_every and not self.checkpoint_every:
      raise ValueError(
        f'keep_every={self.keep_every} keeps nothing with checkpoint_every=0, '
        'which saves the end alone'
      )
    if self.keep_every % (self.checkpoint_every or 1):
      raise ValueError(
        f'keep_every={self.keep_every} must be a multiple of '
        f'checkpoint_every={self.checkpoint_every}'
      )
    experts = self.model.moe.num_experts
    if self.mesh.expert > 1 and (not experts or experts % self.mesh.expert):
      raise ValueError(
        f'model.moe.num_experts={experts} does not divide over '
        f'mesh.expert={self.mesh.expert}'
      )
    if self.mesh.head == 'vocab' and self.model.vocab_size % self.mesh.pipe:
      raise ValueError(
        f'model.vocab_size={self.model.vocab_size} does not divide over '
        f"mesh.pipe={self.mesh.pipe}, which mesh.head='vocab' asks for"
      )
    if self.optimizer.warmup_steps >= self.num_steps:
      raise ValueError(
        f'optimizer.warmup_steps={self.optimizer.warmup_steps} must be less '
        f'than num_steps={self.num_steps}'
      )

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.seq_len
