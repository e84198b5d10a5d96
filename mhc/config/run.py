"""The settings of a training run, together a `Config`."""

import dataclasses
from typing import Literal

from mhc.config import checks
from mhc.config.model import ModelConfig
from mhc.config.task import TaskConfig

Schedule = Literal['gpipe', '1f1b', 'interleaved', 'wave_v', 'dualpipev']
Head = Literal['last', 'vocab']
Keep = Literal['inputs', 'stages']
MOST_AHEAD = 64


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with the settings of the paper's Table 5, except for the rate."""

  # 'muon' orthogonalises the updates of matrices; embeddings, head, norms and
  # the connections' biases and gates keep AdamW.
  name: Literal['adamw', 'muon'] = 'adamw'
  # Whose Muon: 'moonlight' orthogonalises roughly, in 5 steps; 'deepseek_v4' in
  # 10, to 1e-3, and its updates are a tenth smaller (training/optimizer.py).
  # Runs saved before there was a choice have the first, hence the default.
  muon: Literal['moonlight', 'deepseek_v4'] = 'moonlight'
  learning_rate: float = 3e-3
  warmup_steps: int = 30
  # 'step' multiplies the rate by decay_factors at decay_points, fractions of
  # the run; 'cosine' decays to 0; 'constant' does not decay.
  schedule: Literal['step', 'cosine', 'constant'] = 'step'
  decay_points: tuple[float, ...] = (0.8, 0.9)
  decay_factors: tuple[float, ...] = (0.316, 0.1)
  b1: float = 0.9
  b2: float = 0.95
  # For gradients below 5e-19, whose squares float32 does not hold, a larger
  # floor takes its place (training/optimizer.py), and bounds their updates.
  eps: float = 1e-20
  weight_decay: float = 0.1
  # Nesterov momentum, for name='muon'.
  muon_momentum: float = 0.95
  # What is trained: all, or the connections and adapters alone, and the rest
  # stays as it starts.
  trained: Literal['all', 'connections'] = 'all'
  # Multiplies the rate of the connections.
  connection_rate: float = 1.0
  # Bound on the global gradient norm, 0 for none. The paper gives none.
  clip_norm: float = 1.0

  def __post_init__(self):
    checks.check_types(self)
    if self.name != 'muon' and self.muon != type(self).muon:
      raise ValueError(
        f'optimizer.muon={self.muon!r} would not be used: '
        f"optimizer.name={self.name!r} is no Muon; set optimizer.name='muon' "
        'too'
      )
    checks.positive(self, 'learning_rate', 'eps', 'connection_rate')
    checks.not_negative(self, 'warmup_steps', 'weight_decay', 'clip_norm')
    for name in ('b1', 'b2', 'muon_momentum'):
      # Numbers nearer to 1 are 1 in float32.
      if not 0 <= getattr(self, name) <= 1 - 2**-24:
        raise ValueError(
          f'optimizer.{name}={getattr(self, name)} must be in [0, 1 - 2**-24]'
        )
    if len(self.decay_points) != len(self.decay_factors):
      raise ValueError(
        f'optimizer.decay_points={self.decay_points} and '
        f'optimizer.decay_factors={self.decay_factors} must be equally many'
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
  # glob pattern, tokenised to bytes (docs/your_own_text.md); a token folder
  # written by launch/prepare_data.py; '' is the source code of the running
  # Python's standard library, about 10 MB.
  path: str = ''
  # Several such paths in place of one, each as 'PATH=WEIGHT': of the rows of
  # training, that share of the sum of weights is from it. Each has its own
  # held-out text. Copies are dropped within each path only.
  mixture: tuple[str, ...] = ()
  # Questions with levels of difficulty in place of text, see TaskConfig.
  task: TaskConfig = TaskConfig()
  # The field of JSON or column of Parquet that holds the text.
  text_field: str = 'text'
  # Of token files of others without a header; '' for uint16, refused where it
  # looks like uint32.
  token_dtype: Literal['', 'uint16', 'uint32'] = ''
  # A corrupted record, file or block of tokens stops the run, or is skipped and
  # counted.
  on_damage: Literal['stop', 'skip'] = 'stop'
  seq_len: int = 64
  batch_size: int = 8
  # Rows per device and microbatch, 0 for a device's whole share of the batch.
  # Gradients are accumulated; what depends on the tokens taken together
  # (capacity, the Sinkhorn router) then depends on those of a microbatch.
  microbatch_size: int = 0
  # Rows that are read at once, and come one after the other in the same row of
  # the batch; 1 to shuffle all rows. For slow disks and many processes, of
  # token folders, whose documents are shuffled (data/batches.py).
  block_rows: int = 1
  # Batches of token folders that are read ahead, by a thread each; 0 for none.
  read_ahead: int = 4

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(
      self,
      seq_len=2,
      batch_size=1,
      microbatch_size=0,
      block_rows=1,
      read_ahead=0,
    )
    if self.read_ahead > MOST_AHEAD:
      raise ValueError(
        f'data.read_ahead={self.read_ahead} batches, a thread each, must be at '
        f'most {MOST_AHEAD}'
      )
    self.sources()
    if self.task.name:
      self._check_task()

  def _check_task(self):
    name = self.task.name
    if self.path or self.mixture:
      raise ValueError(
        f'data.task.name={name!r} and text, data.path={self.path!r} and '
        f'data.mixture={self.mixture}, exclude each other: give one of them'
      )
    if self.seq_len <= self.task.num_bytes:
      raise ValueError(
        f'data.seq_len={self.seq_len} is too short for the '
        f'{self.task.num_bytes} bytes of data.task.name={name!r}: set it to '
        f'{self.task.num_bytes + 1} or more, or ask less in a row'
      )

  @property
  def targets_per_row(self) -> int:
    """The tokens of a row that are predicted."""
    return self.task.num_answer_bytes if self.task.name else self.seq_len

  def sources(self) -> tuple[tuple[str, float], ...]:
    """The paths of text and their weights: `mixture`, or `path` alone.

    Raises:
      ValueError: an entry of `mixture` is not PATH=WEIGHT.
    """
    if not self.mixture:
      return ((self.path, 1.0),)
    if self.path:
      raise ValueError(
        f'data.path={self.path!r} and data.mixture={self.mixture} exclude each '
        'other: give one of them'
      )
    found = {}
    for entry in self.mixture:
      path, _, weight = entry.rpartition('=')
      try:
        value = float(weight)
      except ValueError:
        value = 0.0
      if not checks.SMALLEST <= value <= checks.LARGEST or path in found:
        raise ValueError(
          f'data.mixture={self.mixture}: {entry!r} must be PATH=WEIGHT, such '
          "as 'data/web=0.7', with a positive weight and a path of its own"
        )
      found[path] = value
    return tuple(found.items())


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The device mesh; it does not change what is computed.

  But for `moe.dispatch='capacity'` and `moe.router='sinkhorn'`, which depend on
  the tokens that a device has at a time.

  `pipe` x `expert` x `data`, the rest of the devices: `data` and `expert` split
  the batch, `data` alone every other array of the training state.
  """

  # 0 for the largest number that divides the batch.
  num_devices: int = 0
  # Devices that split the depth, a pipeline of stages.
  pipe: int = 1
  # Devices that split the experts of a layer.
  expert: int = 1
  # The pipeline schedule, see pipeline/schedules.py.
  schedule: Schedule = 'interleaved'
  # Virtual stages per device (Megatron: model chunks), for
  # schedule='interleaved'; the other schedules fix it.
  chunks: int = 2
  # Sub-batches of a microbatch that a block computes side by side: the
  # all-to-all of one overlaps the computation of another.
  num_sub_batches: int = 1
  # Which devices compute the logits: 'last', those of the last stage; 'vocab',
  # all, each for its part of the vocabulary.
  head: Head = 'last'
  # What a pipeline keeps of a stage for its gradient: 'inputs', from which it
  # is computed again; 'stages', all that the gradient needs, see
  # pipeline/keeping.py. The latter is faster and takes more memory.
  keep: Keep = 'inputs'
  # Overlap communication with computation on TPUs (training/xla_options.py).
  overlap: bool = True

  def __post_init__(self):
    checks.check_types(self)
    checks.not_negative(self, 'num_devices')
    checks.at_least(self, pipe=1, expert=1, chunks=2, num_sub_batches=1)
    if self.num_devices % (self.pipe * self.expert):
      raise ValueError(
        f'mesh.num_devices={self.num_devices} is not a multiple of '
        f'mesh.pipe={self.pipe} times mesh.expert={self.expert}'
      )
    if self.keep == 'stages' and (self.pipe == 1 or self.head != 'vocab'):
      raise ValueError(
        "mesh.keep='stages' is for pipelines whose head is split: it needs "
        f"mesh.pipe > 1, is {self.pipe}, and mesh.head='vocab', is "
        f'{self.head!r}'
      )


Policy = Literal['log', 'skip_step', 'rollback', 'stop']
# For guards that act between steps, when there is no step to skip.
Between = Literal['log', 'rollback', 'stop']


@dataclasses.dataclass(frozen=True)
class GuardsConfig:
  """The policy and the bounds of every guard (`mhc.training.guards`).

  'log' writes an event, 'skip_step' skips that update, 'rollback' restores the
  last checkpoint and continues with the data after the alert, and restores the
  previous one if that leads to an alert again, 'stop' ends the run.
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
  # Factor on the learning rate at each rollback.
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

  # Determines the initial parameters and the order of the data.
  seed: int = 0
  # The order of the data alone, to vary it and the parameters apart; -1 for
  # `seed`.
  data_seed: int = -1
  # A folder whose weights a new run starts from: a run's, an export's or one of
  # Hugging Face (training/start.py); '' for random ones.
  start_from: str = ''
  # Whether the optimiser's moments come along, of a run; else they start at 0.
  start_moments: bool = False
  num_steps: int = 400
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  optimizer: OptimizerConfig = OptimizerConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  guards: GuardsConfig = GuardsConfig()
  # Each `*_every` is in steps, 0 for only at the end.
  eval_every: int = 100
  eval_sequences: int = 256
  # Held-out rows of the last evaluation, which the summary is of; 0 for all.
  final_sequences: int = 4096
  probe_every: int = 25
  # Held-out rows of a probe, the first of the eval_sequences.
  probe_sequences: int = 1
  checkpoint_every: int = 200
  # The newest ones are kept, and those at multiples of keep_every (0: none).
  keep_checkpoints: int = 2
  keep_every: int = 0
  tensorboard: bool = False
  # A project of Weights & Biases, which then gets a copy of the metrics; ''
  # for none. WANDB_MODE=offline keeps it in the run's folder.
  wandb: str = ''
  # What a run is doing is printed, with the stacks of its threads, when it has
  # got nowhere for as many seconds; 0 for never.
  watchdog_s: float = 600.0

  def __post_init__(self):
    checks.check_types(self)
    checks.at_least(
      self,
      num_steps=1,
      eval_sequences=1,
      probe_sequences=1,
      keep_checkpoints=1,
      data_seed=-1,
    )
    checks.not_negative(
      self,
      'seed',
      'eval_every',
      'probe_every',
      'checkpoint_every',
      'keep_every',
      'final_sequences',
      'watchdog_s',
    )
    if self.start_moments and not self.start_from:
      raise ValueError(
        'start_moments=True would not be used: start_from names no run'
      )
    if self.probe_sequences > self.eval_sequences:
      raise ValueError(
        f'probe_sequences={self.probe_sequences} are more than the '
        f'eval_sequences={self.eval_sequences} rows that they are taken from: '
        'set eval_sequences to as many'
      )
    if self.keep_every and not self.checkpoint_every:
      raise ValueError(
        f'keep_every={self.keep_every} keeps nothing with checkpoint_every=0, '
        'which saves only the end: set checkpoint_every'
      )
    if self.keep_every % (self.checkpoint_every or 1):
      raise ValueError(
        f'keep_every={self.keep_every} must be a multiple of '
        f'checkpoint_every={self.checkpoint_every}'
      )
    experts = self.model.moe.num_experts
    if self.mesh.expert > 1 and (not experts or experts % self.mesh.expert):
      raise ValueError(
        f'model.moe.num_experts={experts} is not a multiple of '
        f'mesh.expert={self.mesh.expert}'
      )
    if self.mesh.head == 'vocab' and self.model.vocab_size % self.mesh.pipe:
      raise ValueError(
        f'model.vocab_size={self.model.vocab_size} is not a multiple of '
        f"mesh.pipe={self.mesh.pipe}, which mesh.head='vocab' requires"
      )
    if self.optimizer.warmup_steps >= self.num_steps:
      raise ValueError(
        f'optimizer.warmup_steps={self.optimizer.warmup_steps} must be less '
        f'than num_steps={self.num_steps}'
      )

  @property
  def data_order(self) -> int:
    """The seed of the order of the data."""
    return self.seed if self.data_seed < 0 else self.data_seed

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.seq_len
