"""AdamW and Muon, the learning rate schedule, and the weight decay mask."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import optax

from mhc import config as config_lib
from mhc.config import checks
from mhc.model import parameters

# The quintic of Newton and Schulz that leads singular values near 1 fast, and
# stays about there (Jordan).
FAST = (3.4445, -4.7750, 2.0315)
# The one that converges: f(1) = 1, f'(1) = 0.
EXACT = (2.0, -1.5, 0.5)


class Muon(NamedTuple):
  """How Muon makes an update of a matrix M [m, n].

  X_0 = M / |M|_F, X_{i+1} = a X_i + b (X_i X_i^T) X_i + c (X_i X_i^T)^2 X_i;
  the update is rms sqrt(max(m, n)) X.
  """

  # (a, b, c) of each step, or of all.
  coefficients: tuple[float, ...] | tuple[tuple[float, ...], ...]
  num_steps: int
  # The root mean square of updates of full rank, about AdamW's, so that one
  # learning rate serves both.
  rms: float


MUON = {
  # arXiv 2502.16982, Sec. 2.2. One triple, not five of them: optax keeps them
  # in its state, whose shapes a saved run has.
  'moonlight': Muon(FAST, 5, 0.2),
  # arXiv 2606.19348, Sec. 2.4.
  'deepseek_v4': Muon((FAST,) * 8 + (EXACT,) * 2, 10, 0.18),
}


def make(
  config: config_lib.OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Global norm clipping, then AdamW or Muon with decoupled weight decay."""
  rate = learning_rate(config, num_steps)
  update = optax.adamw(
    rate,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    # The second moment v of gradients g with (1 - b2) g^2 below the smallest
    # float32 stays 0. As if it were there, below the root: g / (sqrt(v) + eps)
    # is within 1 then, and above |g| of 2e-15 nothing changes.
    eps_root=checks.SMALLEST / (1 - config.b2),
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  if config.name == 'muon':
    kind = MUON[config.muon]
    muon = optax.contrib.muon(
      rate,
      ns_coeffs=kind.coefficients,
      ns_steps=kind.num_steps,
      beta=config.muon_momentum,
      weight_decay=config.weight_decay,
      consistent_rms=kind.rms,
      # Leading dimensions (stacked blocks, experts) index matrices.
      muon_weight_dimension_numbers=lambda params: jax.tree.map(
        lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params
      ),
    )
    update = optax.partition({'muon': muon, 'adamw': update}, labels)
  if config.connection_rate != 1:
    faster = optax.scale(config.connection_rate)
    update = optax.chain(update, optax.masked(faster, in_connections))
  if config.clip_norm:
    clip = optax.clip_by_global_norm(config.clip_norm)
    update = optax.chain(clip, update)
  if config.trained == 'connections':
    # The norm that is bounded is of what is trained.
    parts = {True: update, False: optax.set_to_zero()}
    update = optax.partition(parts, trained)
  return update


def in_connections(params) -> dict:
  """The mask of what is of the connections, a tree of booleans."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: parameters.row(path).part == 'connection', params
  )


def trained(params) -> dict:
  """The mask of connections and adapters."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: parameters.row(path).part != 'base', params
  )


def labels(params) -> dict:
  """The tree of 'muon' and 'adamw', by the table of `parameters`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: parameters.row(path).optimizer, params
  )


def learning_rate(
  config: config_lib.OptimizerConfig, num_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """The optax schedule: linear warm-up, then the decay of `config.schedule`."""

  def rate(count):
    warmup = jnp.minimum((count + 1) / (config.warmup_steps + 1), 1.0)
    match config.schedule:
      case 'step':
        points = jnp.array(config.decay_points) * num_steps
        factors = jnp.array((1.0, *config.decay_factors))
        decay = factors[jnp.searchsorted(points, count, side='right')]
      case 'cosine':
        done = (count - config.warmup_steps) / (num_steps - config.warmup_steps)
        decay = 0.5 * (1 + jnp.cos(jnp.pi * jnp.maximum(done, 0.0)))
      case 'constant':
        decay = 1.0
    return config.learning_rate * warmup * decay

  return rate


def at_step(state: optax.OptState, step: Int[Array, '']) -> optax.OptState:
  """Returns the state with the schedule at a step of the run.

  Optax counts the updates that were made. Moments are corrected by that number;
  the rate follows the run, of which a skipped update is a step.
  """

  def is_schedule(path, _):
    return getattr(path[-1], 'tuple_name', '') == 'ScaleByScheduleState'

  return optax.tree.set(state, is_schedule, count=step)


def decayed(params) -> dict:
  """The mask of weight decay, a tree of booleans."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: parameters.row(path).decays, params
  )
