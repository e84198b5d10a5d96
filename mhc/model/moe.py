r"""Mixture of experts as in DeepSeek-V3 (arXiv 2412.19437, Sec. 2.1.2).

A token x has the affinity s_i = sigmoid(w_i . x) to each of e routed experts.
The k experts with the largest s_i + b_i are chosen; their outputs are weighed
by s_i over the sum of the chosen s (b only selects), and shared experts, which
every token visits, are added. As the settings say, the weights can be the s
themselves, times a constant, and experts can lie in groups, of which a token
takes the few with the largest sum of their two best s_i + b_i. Where all s
underflow (logits below -88) weights are 0: sums that divide have 1e-20 added,
as in DeepSeek's code.

Load is balanced without an auxiliary loss (arXiv 2408.15664): after each update
b_i grows by `bias_speed` where expert i had fewer tokens than the mean and
shrinks where it had more. For comparison the selection can be by Sinkhorn
instead: the affinities of a device's tokens projected so that every token has
weight 1 and every expert an equal share, the projection of mHC on a rectangle.
That selection lets a token depend on the others at hand, later ones too.
"""

import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mhc import config as config_lib
from mhc import precision
from mhc.model import expert_parallel
from mhc.model import experts as experts_lib
from mhc.model import layers
from mhc.model import parts

SINKHORN_ROUTER_ITERS = 20
# Added to sums of affinities that divide.
EPS = 1e-20


class Stats(NamedTuple):
  """Statistics of one layer on one batch."""

  load: Float[Array, 'e']  # assignments of each expert
  dropped: Float[Array, '']  # fraction of assignments beyond the capacity
  balance_loss: Float[Array, '']  # sequence-wise, 1 when even


class MoE(nnx.Module):
  """Router, routed experts and shared experts in place of an FFN."""

  def __init__(
    self,
    config: config_lib.MoEConfig,
    dim: int,
    *,
    adapter_rank: int = 0,
    rngs: nnx.Rngs,
  ):
    num, hidden = config.num_experts, config.expert_dim

    def stack(rows, columns):
      weight = jax.random.normal(
        rngs.params(), (num, rows, columns), jnp.float32
      )
      return nnx.Param(weight * rows**-0.5)

    self.router = layers.Linear(dim, num, rngs=rngs)
    self.gate = stack(dim, hidden)
    self.up = stack(dim, hidden)
    self.down = stack(hidden, dim)
    self.shared = (
      layers.SwiGLU(
        dim, config.num_shared * hidden, adapter_rank=adapter_rank, rngs=rngs
      )
      if config.num_shared
      else None
    )
    self.config = config

  @parts.part(parts.ROWS)
  def __call__(
    self,
    x: Float[Array, 'b t d'],
    bias: Float[Array, 'e'],
    is_real: Bool[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'b t d'], Stats]:
    """The sum over each token's experts.

    The tokens of a layer that is not real (padding of a pipeline's stage) go to
    no expert, and are counted nowhere.
    """
    config = self.config
    tokens = x.reshape(-1, x.shape[-1])
    scores = jax.nn.sigmoid(
      jnp.matmul(
        tokens.astype(jnp.float32),
        self.router.weight[...],
        precision=jax.lax.Precision.HIGHEST,
      )
    )
    scores = precision.mark('router_scores', scores)
    chosen = self._select(scores, bias)
    best = self._best(scores)
    gates = jnp.take_along_axis(scores, chosen, axis=1)
    if config.normalize_gates:
      gates = shares(gates)
    if config.gate_scale != 1:
      gates = gates * config.gate_scale
    if is_real is not None:
      chosen, best = (
        jnp.where(is_real, one, config.num_experts) for one in (chosen, best)
      )

    with parts.part(parts.EXPERTS):
      weights = experts_lib.Weights(
        *(w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
      )
    if weights.gate.shape[0] < config.num_experts:
      # x comes back unchanged, for the shared experts: see `beside`.
      out, dropped, x = expert_parallel.dispatch_and_combine(
        config, tokens, chosen, gates, weights, x
      )
    else:
      out, dropped = self._apply(weights, tokens, chosen, gates)
    out = out.reshape(x.shape)
    if self.shared is not None:
      with parts.part(parts.DENSE):
        out = out + self.shared(x)
    stats = Stats(
      load=_counts(chosen, config.num_experts),
      dropped=dropped,
      balance_loss=_balance_loss(scores, best, x.shape[0]),
    )
    return out, stats

  def _apply(self, weights, tokens, chosen, gates):
    """The gated sum over chosen experts, and the share of dropped ones."""
    config = self.config
    if config.dispatch == 'capacity':
      room = experts_lib.expert_capacity(config, chosen)
      return experts_lib.capacity(tokens, chosen, gates, weights, room)
    out = experts_lib.dropless(tokens, chosen, gates, weights)
    return out, jnp.zeros((), jnp.float32)

  def _select(self, scores, bias) -> Int[Array, 's k']:
    """The chosen experts; no gradient passes through the choice."""
    scores = jax.lax.stop_gradient(scores)
    match self.config.router:
      case 'bias':
        ranking = scores + bias[None]
      case 'sinkhorn':
        ranking = sinkhorn_scores(scores)
      case 'none':
        ranking = scores
    return self._best(self._in_groups(ranking))

  def _in_groups(self, ranking) -> Float[Array, 's e']:
    """-inf for experts outside a token's groups."""
    groups, chosen = self.config.num_groups, self.config.groups_per_token
    if groups == chosen:
      return ranking
    by_group = ranking.reshape(len(ranking), groups, -1)
    value = jnp.sum(jax.lax.top_k(by_group, 2)[0], axis=-1)
    best = jax.lax.top_k(value, chosen)[1]
    inside = jnp.any(best[:, :, None] == jnp.arange(groups)[None, None], axis=1)
    return jnp.where(inside[:, :, None], by_group, -jnp.inf).reshape(
      ranking.shape
    )

  def _best(self, ranking) -> Int[Array, 's k']:
    ranking = jax.lax.stop_gradient(ranking)
    return jax.lax.top_k(ranking, self.config.experts_per_token)[1]


@jax.custom_jvp
def shares(x: Float[Array, 's k']) -> Float[Array, 's k']:
  """x_i / (sum_j x_j + 1e-20) of affinities >= 0; 0 where all are.

  The derivative never divides by the square of the sum, which underflows
  before the sum does.
  """
  return x / (jnp.sum(x, axis=1, keepdims=True) + EPS)


@shares.defjvp
def _shares_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  total = jnp.sum(x, axis=1, keepdims=True) + EPS
  out = x / total
  return out, (dx - out * jnp.sum(dx, axis=1, keepdims=True)) / total


def merge_stats(parts: list[Stats | None]) -> Stats | None:
  """The statistics of a batch from those of equal parts of it."""
  if parts[0] is None:
    return None
  total = jax.tree.map(lambda *stats: sum(stats[1:], stats[0]), *parts)
  return Stats(
    total.load, total.dropped / len(parts), total.balance_loss / len(parts)
  )


def sinkhorn_scores(scores: Float[Array, 's e']) -> Float[Array, 's e']:
  """Scores, scaled so that rows sum to 1 and columns to s / e; 0 stays 0."""

  def iterate(x, _):
    x = x / (jnp.mean(x, axis=0, keepdims=True) + EPS)
    return x / (jnp.sum(x, axis=1, keepdims=True) + EPS), None

  return jax.lax.scan(iterate, scores, length=SINKHORN_ROUTER_ITERS)[0]


def updated_bias(
  bias: Float[Array, 'l e'], load: Float[Array, 'l e'], speed: float
) -> Float[Array, 'l e']:
  """Loss-free balancing: towards experts that had less than the mean load."""
  mean = jnp.mean(load, axis=1, keepdims=True)
  return bias + speed * jnp.sign(mean - load)


def load_metrics(
  load: Float[Array, 'l e'], dropped: Float[Array, 'l']
) -> dict[str, Float[Array, '']]:
  """Averages over layers; entropy 1 is an even load, such as of one expert."""
  share = load / jnp.sum(load, axis=1, keepdims=True)
  largest = jnp.max(share, axis=1) * load.shape[1]
  logs = jnp.log(jnp.maximum(share, 1e-30))
  entropy = -jnp.sum(share * logs, axis=1) / math.log(max(2, load.shape[1]))
  if load.shape[1] == 1:
    entropy = jnp.ones_like(entropy)
  return {
    'moe/load_max_over_mean': jnp.mean(largest),
    'moe/load_entropy': jnp.mean(entropy),
    'moe/dropped_share': jnp.mean(dropped),
  }


def _counts(chosen, num_experts) -> Float[Array, 'e']:
  """The assignments of each expert, by comparison: nothing is scattered."""
  number = jnp.arange(num_experts, dtype=chosen.dtype)
  return jnp.sum(
    chosen.reshape(1, -1) == number[:, None], axis=1, dtype=jnp.float32
  )


def _balance_loss(scores, best, num_rows):
  """Sequence-wise loss of DeepSeek-V3 (Eq. 17-20), averaged over rows.

  sum_i f_i P_i with f_i = e / (k t) * (tokens of the row for which s_i is one
  of the k `best`) and P_i the row's mean of s_i / sum_j s_j; the gradient is
  through P. Eq. 18 counts by s, whatever the bias or the Sinkhorn router
  chooses.
  """
  num_experts, k = scores.shape[1], best.shape[1]
  normed = shares(scores).reshape(num_rows, -1, num_experts)
  counts = jax.nn.one_hot(best, num_experts).reshape(
    num_rows, -1, k, num_experts
  )
  frequency = jnp.mean(jnp.sum(counts, axis=2), axis=1) * num_experts / k
  return jnp.mean(jnp.sum(frequency * jnp.mean(normed, axis=1), axis=1))
