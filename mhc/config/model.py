"""The settings of a model: connections, experts, transformer."""

import dataclasses
import re
import typing
from typing import Literal

from mhc.config import checks
from mhc.config.attention import AttentionConfig

Kind = Literal[
  'residual',
  'hc',
  'mhc',
  'identity',
  'mhc_lite',
  'kromhc',
  'orthogonal',
  'cyclic',
  'tbp',
  'go',
  'mhc_single_pass',
  'wide_residual',
  'frac',
  'attn_res_block',
  'attn_res',
  'mhar',
  'dense_former',
  'x0',
]
SINKHORN = (
  *('sinkhorn_iters', 'sinkhorn_eps', 'sinkhorn_backward', 'sinkhorn_method'),
)
# Kinds whose streams are slots along the depth.
DEPTH_KINDS = 'attn_res_block', 'attn_res', 'mhar', 'dense_former', 'x0'
KINDS: tuple[str, ...] = typing.get_args(Kind)
Part = Literal['dynamic', 'static', 'off']


@dataclasses.dataclass(frozen=True)
class ConnectionConfig:
  """The residual connection around every sub-layer."""

  # A kind, or 'module:Class' for a class of one's own (docs/own_design.md).
  kind: str = 'mhc'
  # n. The plain residual always has one stream, x0 two; frac cuts one into n
  # fractions. attn_res_block has the embedding and n - 1 blocks of the depth;
  # attn_res, mhar and dense_former follow the depth, whatever is given: a slot
  # for the embedding and one a sub-layer, or one a block.
  num_streams: int = 4
  # How the streams become one before the last norm; 'mhc_single_pass' collapses
  # them by the read weights of its last sub-layer instead.
  collapse: Literal['sum', 'mean', 'learned'] = 'mean'
  sinkhorn_iters: int = 20
  # 0 is the paper's Eq. 9, 1e-6 DeepSeek-V4's kernels.
  sinkhorn_eps: float = 0.0
  sinkhorn_backward: Literal['recompute', 'unrolled', 'implicit'] = 'recompute'
  # 'newton' is the limit of the iteration, in sinkhorn_iters of Newton's steps.
  sinkhorn_method: Literal['sinkhorn', 'newton'] = 'sinkhorn'
  # The passes over the streams: 'xla', the TPU kernels ('pallas', interpreted
  # elsewhere) or the GPU kernels ('triton'); 'auto' is the platform's fastest.
  implementation: Literal['auto', 'xla', 'pallas', 'triton'] = 'auto'
  # The ablations of the paper's Table 1. Each mapping is made from the streams
  # ('dynamic'), is a learned bias alone ('static') or one of the constants
  # H_pre = 1/n, H_post = 1, H_res = I ('off'). A doubly stochastic H_res keeps
  # the mean of the streams, which is all that is read with pre='off': then it
  # changes something only by way of dynamic mappings and collapse='learned'.
  pre: Part = 'dynamic'
  post: Part = 'dynamic'
  res: Part = 'dynamic'
  # What the n copies of the embedding are multiplied by: 'random' is a fixed
  # 1 + 0.1 N(0, 1) for each stream and channel, the same for every seed;
  # 'learned' a parameter for each, 1 at the start.
  expand_scale: Literal['ones', 'random', 'learned'] = 'ones'
  # By how much the diagonal of mHC's logits of H_res starts above the others;
  # 6 is the paper's (H_res near I), at 0 it starts as 1/n.
  res_diagonal: float = 6.0
  # s of kind='go': its H_res is of the squares of a rotation of n s dimensions.
  go_size: int = 2
  # Heads of kind='mhar': groups of channels with a softmax over slots each.
  depth_heads: int = 4
  # How biases of mhc_lite and kromhc start: as mHC's, from the plain residual
  # network, or as in the code of their authors (functional.init).
  init: Literal['mhc', 'authors'] = 'mhc'

  def __post_init__(self):
    checks.check_types(self)
    if not self.is_own:
      checks.one_of('connection.kind', self.kind, KINDS)
    checks.at_least(
      self, num_streams=1, sinkhorn_iters=1, go_size=1, depth_heads=1
    )
    self._check_parts_are_used()
    self._check_streams_separate()
    if self.sinkhorn_method == 'newton' and (
      self.sinkhorn_eps or self.sinkhorn_backward == 'unrolled'
    ):
      raise ValueError(
        "connection.sinkhorn_method='newton' has no iteration: leave "
        f'sinkhorn_eps={self.sinkhorn_eps} and '
        f'sinkhorn_backward={self.sinkhorn_backward!r} as they are by default'
      )
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
        'collapses the streams by the read weights of its last sub-layer'
      )

  def _check_parts_are_used(self):
    unused = {'residual': ('pre', 'post', 'res', 'expand_scale')}
    unused |= {'identity': ('res',)}
    slots = ('pre', 'post', 'res', 'expand_scale', 'collapse')
    unused |= dict.fromkeys(DEPTH_KINDS, slots)
    unused['frac'] = (*slots, *SINKHORN, 'implementation')
    if self.is_own or self.kind == 'wide_residual':
      unused[self.kind] = ('pre', 'post', 'res', *SINKHORN, 'implementation')
    names = unused.get(self.kind, ())
    if self.kind not in ('mhc', 'mhc_single_pass') or self.res == 'off':
      names += ('res_diagonal', 'sinkhorn_method')
    if self.kind != 'go' or self.res == 'off':
      names += ('go_size',)
    if self.kind != 'mhar':
      names += ('depth_heads',)
    if self.kind not in ('mhc_lite', 'kromhc'):
      names += ('init',)
    for name in names:
      default = getattr(type(self), name)
      if getattr(self, name) != default:
        raise ValueError(
          f'connection.{name}={getattr(self, name)!r} would not be used: '
          f'connection.kind={self.kind!r} has no such choice; leave '
          f'{name}={default!r} or take another kind'
        )

  def _check_streams_separate(self):
    """Checks that something makes the streams differ.

    They start as copies. Reading all alike (H_pre = 1/n), every gradient is the
    same for each of them; writing the same to all (H_post = 1), they differ
    only if rows of H_res may have different sums.
    """
    slots = self.kind in DEPTH_KINDS  # which do not start as copies
    if self.streams == 1 or self.expand_scale == 'random' or slots:
      return
    free_rows = self.kind in ('hc', 'orthogonal') and self.res != 'off'
    why = None
    if self.pre == 'off':
      why = "connection.pre='off' reads all streams alike"
    elif self.post == 'off' and not free_rows:
      why = "connection.post='off' writes the same to all streams"
    if why:
      raise ValueError(
        f'{why}, which start as copies and would stay equal for ever: set '
        "connection.expand_scale='random', which makes them differ"
      )

  @property
  def is_own(self) -> bool:
    """Whether the kind names a class from outside, 'module:Class'."""
    return bool(re.fullmatch(r'[A-Za-z_][\w.]*:[A-Za-z_]\w*', self.kind))

  @property
  def streams(self) -> int:
    one = {'residual': 1, 'frac': 1, 'x0': 2}
    return one.get(self.kind, self.num_streams)

  @property
  def mixes_streams(self) -> bool:
    """Whether there is an H_res; without one it is I."""
    never = ('residual', 'identity', 'wide_residual')
    never += ('attn_res_block', 'attn_res', 'mhar')
    return self.kind not in never and self.res != 'off'


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
  # affinity alone, whatever the load. With 'sinkhorn' and with a capacity a
  # token's experts depend on the tokens that its device has at a time: on
  # another mesh the same settings train another model.
  router: Literal['bias', 'sinkhorn', 'none'] = 'bias'
  # Experts in groups of equal size: a token's experts are of the
  # `groups_per_token` groups whose two best are best (DeepSeek-V3; 1 for none).
  num_groups: int = 1
  groups_per_token: int = 1
  # Whether the gates of a token's experts are divided by their sum, and what
  # they are multiplied by then.
  normalize_gates: bool = True
  gate_scale: float = 1.0
  bias_speed: float = 0.001
  # Weight of the sequence-wise auxiliary loss.
  balance_loss: float = 0.0
  dispatch: Literal['dropless', 'capacity'] = 'dropless'
  # Expert capacity over the mean load, for dispatch='capacity'.
  capacity_factor: float = 1.25
  # The collective by which tokens reach experts on other devices: 'all_gather'
  # sends every token to all of them; 'ragged_all_to_all' (not on CPUs) and
  # 'all_to_all' (in buffers of one size) to those of its experts. 'auto' is
  # 'all_gather' for as many devices as a token has experts or fewer, else
  # 'ragged_all_to_all' or, on CPUs, 'all_to_all'.
  transport: Literal[
    'auto', 'all_gather', 'all_to_all', 'ragged_all_to_all'
  ] = 'auto'
  # Rows of those buffers over the mean; the overflow goes in another round, no
  # token is dropped.
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
      num_groups=1,
      groups_per_token=1,
    )
    checks.not_negative(self, 'bias_speed', 'balance_loss')
    checks.positive(self, 'capacity_factor', 'buffer_factor', 'gate_scale')
    self._check_groups()
    if 0 < self.num_experts < self.experts_per_token:
      raise ValueError(
        f'moe.experts_per_token={self.experts_per_token} is more than '
        f'moe.num_experts={self.num_experts}'
      )

  def _check_groups(self):
    groups, chosen = self.num_groups, self.groups_per_token
    if groups == chosen:
      return
    size, rest = divmod(self.num_experts, groups)
    if rest or chosen > groups or size < 2:
      raise ValueError(
        f'moe.num_groups={groups} and moe.groups_per_token={chosen}: '
        f'moe.num_experts={self.num_experts} must be as many groups of two '
        'experts or more, of which a token takes some'
      )
    if chosen * size < self.experts_per_token:
      raise ValueError(
        f'moe.groups_per_token={chosen} groups of {size} experts are fewer '
        f'than moe.experts_per_token={self.experts_per_token}'
      )
    if self.router == 'sinkhorn':
      raise ValueError(
        f"moe.num_groups={groups} would not be used: moe.router='sinkhorn' "
        'evens the load over all experts'
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
  # One matrix for the embedding and, transposed, the logits.
  tied_embeddings: bool = False
  # Type of streams and activations; parameters and mappings are float32.
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  # What the backward pass recomputes, and the sub-layers between saved streams
  # (0: the paper's optimum), see model/recompute.py. Recomputing whole blocks
  # also saves time on a CPU, whose limit is the cache.
  recompute: Literal['none', 'mhc', 'mhc+experts', 'mhc+block', 'full'] = 'full'
  recompute_every: int = 2
  # Low-rank adapters (LoRA, arXiv 2106.09685) of this rank beside the matrices
  # of attention and of dense feed-forward, 0 for none. They start as nothing.
  adapter_rank: int = 0
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
    checks.not_negative(self, 'norm_eps', 'recompute_every', 'adapter_rank')
    self._place_slots()
    if self.recompute_every % 2:
      raise ValueError(
        f'model.recompute_every={self.recompute_every} must be even: a block '
        'has two sub-layers (0 for the optimum of the paper)'
      )

  def _place_slots(self):
    """Gives depth routing its slots, or checks them."""
    kind, n = self.connection.kind, self.connection.num_streams
    by_depth = {
      'attn_res': 2 * self.num_blocks + 1,
      'mhar': 2 * self.num_blocks + 1,
      'dense_former': self.num_blocks + 1,
    }
    slots = by_depth.get(kind, n)
    if slots != n:
      connection = dataclasses.replace(self.connection, num_streams=slots)
      object.__setattr__(self, 'connection', connection)
    parts = {'mhar': 'depth_heads', 'frac': 'num_streams'}.get(kind)
    if parts and self.dim % getattr(self.connection, parts):
      raise ValueError(
        f'connection.{parts}={getattr(self.connection, parts)} of {kind} must '
        f'divide model.dim={self.dim}'
      )
    if kind == 'attn_res_block' and not 2 <= n <= 2 * self.num_blocks + 1:
      raise ValueError(
        f'connection.num_streams={n} of attn_res_block is the embedding and '
        f'{n - 1} blocks of the depth, of {2 * self.num_blocks} sub-layers '
        f'(model.num_blocks={self.num_blocks}): take from 2 to '
        f'{2 * self.num_blocks + 1}'
      )

  @property
  def plain(self) -> 'ModelConfig':
    """The same network around the plain residual."""
    residual = ConnectionConfig(kind='residual')
    return dataclasses.replace(self, connection=residual)

  @property
  def stack(self) -> str:
    """The stack of blocks that a pipeline is cut from."""
    return 'moe_blocks' if self.moe.num_experts else 'dense_blocks'

  @property
  def num_moe_blocks(self) -> int:
    if not self.moe.num_experts:
      return 0
    return self.num_blocks - self.moe.num_dense_blocks
