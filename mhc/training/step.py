"""The training step of a run: initialise, update, score, probe.

`train_step`, `token_losses` and `probe` are functions of a `Placement` and
global arrays; `Step` compiles each at its first use. Loss and
gradient run inside a `shard_map` (`mhc.parallel`); the update is plain jit on
sharded arrays.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np
import optax

from mhc import config as config_lib
from mhc import gains
from mhc.kernels import chips
from mhc.model import expert_parallel
from mhc.model import moe
from mhc.model import parts
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.parallel import sharded
from mhc.parallel.placement import Placement
from mhc.training import optimizer as optimizer_lib
from mhc.training import state as state_lib
from mhc.training import xla_options
from mhc.training.state import TrainState


class StepInputs(NamedTuple):
  """Inputs of a step from the host, float32 [] each; see `guards`."""

  loss_limit: jax.Array  # a loss above it is a spike
  rate: jax.Array  # multiplies the learning rate


def train_step(
  p: Placement, state: TrainState, tokens: jax.Array, inputs: StepInputs
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update; one that guards skip is a step and changes nothing else.

  Args:
    p: config and mesh that the step is compiled for.
    state: in pipeline order.
    tokens: int32 [b, t + 1].
    inputs: those of the host.

  Returns:
    the new state, and metrics.
  """
  grads = sharded.loss_and_grads(p)(state.params, state.router_bias, tokens)
  with parts.part(parts.OPTIMISER):
    return _update(p, state, inputs, *grads)


def _update(p, state, inputs, mean_nats, grads, load):
  """The new state and the metrics, from means over the batch."""
  config = p.config
  optimizer = optimizer_lib.make(config.optimizer, config.num_steps)
  opt_state = optimizer_lib.at_step(state.opt_state, state.step)
  updates, opt_state = optimizer.update(grads, opt_state, state.params)
  norm = optax.tree.norm(grads)
  schedule = optimizer_lib.learning_rate(config.optimizer, config.num_steps)
  rate = schedule(state.step)
  if config.guards.rollback_rate != 1:
    rate *= inputs.rate
    updates = jax.tree.map(
      functools.partial(jnp.multiply, inputs.rate), updates
    )
  metrics = {
    'loss/train': mean_nats,
    'grad/global_norm': norm,
    'optimizer/learning_rate': rate,
  }
  router_bias = state.router_bias
  if load is not None:
    metrics |= moe.load_metrics(*map(p.layout.to_depth_order, load))
    if config.model.moe.router == 'bias':
      router_bias = moe.updated_bias(
        router_bias, load[0], config.model.moe.bias_speed
      )
  params = optax.apply_updates(state.params, updates)
  new = TrainState(state.step + 1, params, opt_state, router_bias)
  reasons = _reasons_to_skip(config.guards, mean_nats, norm, inputs)
  if reasons:
    skip = functools.reduce(jnp.logical_or, reasons)
    new = jax.tree.map(functools.partial(jnp.where, skip), state, new)
    new = new._replace(step=state.step + 1)
    metrics['optimizer/skipped'] = skip.astype(jnp.float32)
  return new, metrics


def _reasons_to_skip(guards, nats, norm, inputs):
  """Conditions that skip the update: booleans, none if no guard skips."""
  reasons = []
  if guards.nonfinite == 'skip_step':
    reasons.append(~(jnp.isfinite(nats) & jnp.isfinite(norm)))
  if guards.loss_spike == 'skip_step':
    reasons.append(nats > inputs.loss_limit)
  return reasons


def token_losses(
  p: Placement, state: TrainState, tokens: jax.Array
) -> jax.Array:
  """The summed negative log-likelihood of each row's t targets, float32 [b]."""
  return sharded.token_losses(p)(state.params, state.router_bias, tokens)


def are_likeliest(
  p: Placement, state: TrainState, tokens: jax.Array
) -> jax.Array:
  """Whether each row's t targets have the largest logits: 1 or 0 [b, t]."""
  return sharded.are_likeliest(p)(state.params, state.router_bias, tokens)


def probe(
  p: Placement, state: TrainState, tokens: jax.Array
) -> dict[str, jax.Array]:
  """Returns `gains.profile` of H_res on tokens int32 [b, t], and the streams.

  Averaged over the b t tokens, for each of l sub-layers:

    stream_cosine, stream_rms [l]: of the streams that enter it, the mean cosine
      of their pairs and the root mean square.
    pre_mean, post_mean [l, n]: H_pre by which it reads, H_post by which it
      writes; 1 for the plain residual.
    streams_read [l]: how many streams it reads, see `gains.streams_read`.
  """
  stack, before = sharded.stream_stats(p)(
    state.params, state.router_bias, tokens
  )
  stack = jax.tree.map(p.layout.to_depth_order, stack)
  if before is not None:
    stack = jax.tree.map(_concatenate, before, stack)
  found = jax.tree.map(_by_sublayer, stack)
  return gains.profile(found.res) | {
    'stream_cosine': jnp.mean(found.cosine, axis=1),
    'stream_rms': jnp.mean(found.rms, axis=1),
    'pre_mean': jnp.mean(found.pre, axis=1),
    'post_mean': jnp.mean(found.post, axis=1),
    'streams_read': jnp.mean(gains.streams_read(found.pre), axis=1),
  }


def _concatenate(*stacks):
  return jnp.concatenate(stacks)


def _by_sublayer(stats):
  """[blocks, 2, ...] -> [l, ...]."""
  return stats.reshape(-1, *stats.shape[2:])


def _unchanged(state):
  return state


@dataclasses.dataclass(frozen=True)
class Step:
  """The programs of a run, each compiled at its first use."""

  placement: Placement

  @property
  def mesh(self) -> Mesh:
    return self.placement.mesh

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """The abstract state in pipeline order, as it trains."""
    return state_lib.abstract_training(self.placement)

  @functools.cached_property
  def saved_state(self) -> TrainState:
    """The abstract state in depth order, as it is saved."""
    return state_lib.abstract_saved(self.placement)

  @property
  def abstract_tokens(self) -> jax.ShapeDtypeStruct:
    data = self.placement.config.data
    return jax.ShapeDtypeStruct(
      (data.batch_size, data.seq_len + 1),
      jnp.int32,
      sharding=NamedSharding(self.mesh, partition.BATCH),
    )

  @property
  def abstract_inputs(self) -> StepInputs:
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
    return StepInputs(scalar, scalar)

  @functools.cached_property
  def init(self) -> Callable:
    """seed -> initial state in pipeline order."""
    program = jax.jit(
      self._init, out_shardings=state_lib.shardings(self.abstract_state)
    )
    # From the key's numbers, which every process has: one program for all.
    return lambda seed: program(
      np.asarray(jax.random.key_data(jax.random.key(seed)))
    )

  @functools.cached_property
  def to_pipeline_order(self) -> Callable:
    """State in depth order -> in pipeline order."""
    p = self.placement
    return self._reordered(p.to_pipeline_order, self.abstract_state)

  @functools.cached_property
  def to_depth_order(self) -> Callable:
    """State in pipeline order -> in depth order."""
    return self._reordered(self.placement.to_depth_order, self.saved_state)

  def trace(self) -> jax.stages.Traced:
    """Traces the update, which donates the state."""
    update = jax.jit(
      functools.partial(train_step, self.placement),
      donate_argnums=0,
      out_shardings=(state_lib.shardings(self.abstract_state), None),
    )
    return update.trace(
      self.abstract_state, self.abstract_tokens, self.abstract_inputs
    )

  def lower(self) -> jax.stages.Lowered:
    """Lowers the update."""
    return self.trace().lower()

  def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles what `lower` has returned."""
    return lowered.compile(compiler_options(self.placement))

  @functools.cached_property
  def train(self) -> jax.stages.Compiled:
    """state, tokens, inputs -> state, metrics; donates the state."""
    return self.compile(self.lower())

  def random_tokens(self) -> jax.Array:
    """A batch of random bytes, to time steps with."""
    shape = self.abstract_tokens.shape
    tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
    return partition.put(tokens, self.mesh, partition.BATCH)

  def inputs(self, loss_limit=math.inf, rate=1.0) -> StepInputs:
    """Puts inputs on the devices; the defaults restrict nothing."""
    both = StepInputs(np.float32(loss_limit), np.float32(rate))
    return partition.put(both, self.mesh, partition.REPLICATED)

  @functools.cached_property
  def token_losses(self) -> Callable:
    return self._compiled(token_losses)

  @functools.cached_property
  def are_likeliest(self) -> Callable:
    return self._compiled(are_likeliest)

  @functools.cached_property
  def probe(self) -> Callable:
    return self._compiled(probe)

  @property
  def memory(self):
    """XLA's memory analysis of one update on one device."""
    return self.train.memory_analysis()

  def _init(self, key_data):
    p = self.placement
    key = jax.random.wrap_key_data(key_data)
    return p.to_pipeline_order(state_lib.init(p.config, key))

  def _reordered(self, reorder, abstract):
    if self.placement.layout.is_depth_order:
      return _unchanged
    full, model = (
      jax.jit(reorder, out_shardings=state_lib.shardings(state))
      for state in (abstract, abstract._replace(opt_state=None))
    )
    return lambda state: (model if state.opt_state is None else full)(state)

  def _compiled(self, function):
    return jax.jit(
      functools.partial(function, self.placement),
      out_shardings=self._replicated,
    )

  @property
  def _replicated(self):
    """The sharding of results that every process can read."""
    return NamedSharding(self.mesh, partition.REPLICATED)


def build(config: config_lib.Config) -> Step:
  """The step of a run, shared by configs that compile to the same programs."""
  data = dataclasses.replace(config.data, path='', mixture=(), on_damage='stop')
  guards = config_lib.GuardsConfig(
    nonfinite=_skips(config.guards.nonfinite),
    loss_spike=_skips(config.guards.loss_spike),
    rollback_rate=config.guards.rollback_rate,
  )
  kept = ('num_steps', 'model', 'optimizer', 'mesh')
  return _build(
    config_lib.Config(
      **{name: getattr(config, name) for name in kept}, data=data, guards=guards
    )
  )


def _skips(policy):
  return policy if policy == 'skip_step' else 'log'


@functools.lru_cache(maxsize=8)
def _build(config):
  mesh = mesh_lib.make_mesh(config.mesh, config.data)
  return Step(Placement(config, mesh))


def compiler_options(p: Placement) -> dict:
  """The compiler options for the devices of the mesh, see `xla_options`."""
  kind = p.mesh.devices.flat[0].device_kind
  for generation, chip in chips.CHIPS.items():
    if chip.kind == kind and p.config.mesh.overlap and p.mesh.size > 1:
      ahead = not p.is_pipelined and not _gathers_tokens(p.config)
      return xla_options.options(generation, ahead)
  return {}


def _gathers_tokens(config):
  """Whether tokens travel to their experts by all_gather."""
  size = config.mesh.expert
  way = expert_parallel.transport(config.model.moe, size)
  return size > 1 and way == 'all_gather'
