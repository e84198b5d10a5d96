"""The compiled programs of a run: initialise, update, score, probe.

`jax.shard_map` is manual over the whole mesh and wraps the loss and its
gradient (`loss`): inside, a batch is the local one and sums over devices are
written out. The update is plain jit on arrays as they lie.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np
import optax

from mhc import config as config_lib
from mhc import gains
from mhc.kernels import api
from mhc.kernels import chips
from mhc.model import moe
from mhc.model import transformer
from mhc.parallel import loss
from mhc.parallel import mesh as mesh_lib
from mhc.pipeline import stage_layout
from mhc.training import optimizer as optimizer_lib
from mhc.training import xla_options

Params = dict[str, Any]  # nested; leaves are float32 arrays


class TrainState(NamedTuple):
  step: jax.Array  # int32 [], updates done
  params: Params
  opt_state: optax.OptState
  router_bias: jax.Array | None  # float32 [l, e] of the l blocks with experts


class Controls(NamedTuple):
  """What the host knows of the steps before, float32 [] each; see `guards`."""

  loss_limit: jax.Array  # a loss above is a spike
  rate: jax.Array  # multiplies the learning rate


class Functions(NamedTuple):
  """What a run executes, not yet compiled; t is `seq_len`.

  A state that trains has its blocks placed over the stages of the pipeline, one
  that is saved has them in order of depth: `place` and `canonical` (`layout`).

  init: seed -> state.
  loss_and_grads: parameters, router's bias, tokens int32 [b, t + 1] -> mean
    loss, its gradient, loads of the experts.
  train_step: state, tokens int32 [b, t + 1], controls -> state, metrics. With
    guards that skip, a step that they refuse counts but changes nothing else.
  row_nats: state, tokens int32 [b, t + 1] -> float32 [b], the summed negative
    log-likelihood of each row's t targets.
  probe: state, tokens int32 [1, t] -> `gains.profile` of H_res on them, and of
    the streams that enter each of l sub-layers stream_cosine, stream_rms [l]:
    mean cosine of their pairs and root mean square, averaged over tokens.
  """

  abstract_state: TrainState  # of jax.ShapeDtypeStruct, with shardings
  canonical_state: TrainState  # likewise
  layout: stage_layout.Layout
  abstract_tokens: jax.ShapeDtypeStruct
  abstract_controls: Controls
  place: Callable
  canonical: Callable
  init: Callable
  loss_and_grads: Callable
  train_step: Callable
  row_nats: Callable
  probe: Callable

  def lower(self) -> jax.stages.Lowered:
    """The update from abstract shapes; it donates the state."""
    update = jax.jit(
      self.train_step,
      donate_argnums=0,
      out_shardings=(shardings(self.abstract_state), None),
    )
    return update.lower(
      self.abstract_state, self.abstract_tokens, self.abstract_controls
    )


def compiler_options(config: config_lib.Config, mesh: Mesh) -> dict:
  """What the compiler of the mesh's devices is told, see `compiler`."""
  kind = mesh.devices.flat[0].device_kind
  for generation, chip in chips.CHIPS.items():
    if chip.kind == kind and config.mesh.overlap and mesh.size > 1:
      return xla_options.options(generation, ahead=config.mesh.pipe == 1)
  return {}


@dataclasses.dataclass(frozen=True)
class Programs:
  """`Functions`, each compiled when it is first asked for."""

  mesh: Mesh
  functions: Functions
  compiler_options: dict

  @property
  def abstract_state(self) -> TrainState:
    return self.functions.abstract_state

  @functools.cached_property
  def init(self) -> Callable:
    return jax.jit(
      self.functions.init,
      static_argnums=0,
      out_shardings=shardings(self.abstract_state),
    )

  @functools.cached_property
  def place(self) -> Callable:
    """A state as it is saved -> as it trains."""
    return self._reordered(self.functions.place, self.abstract_state)

  @functools.cached_property
  def canonical(self) -> Callable:
    """A state as it trains -> as it is saved."""
    return self._reordered(
      self.functions.canonical, self.functions.canonical_state
    )

  def _reordered(self, reorder, abstract):
    if self.functions.layout.is_canonical:
      return lambda state: state
    return jax.jit(reorder, out_shardings=shardings(abstract))

  @functools.cached_property
  def train_step(self) -> jax.stages.Compiled:
    """Donates the state."""
    return self.functions.lower().compile(self.compiler_options)

  def controls(self, loss_limit=math.inf, rate=1.0) -> Controls:
    """On the devices; by default of a step that nothing holds back."""
    both = Controls(np.float32(loss_limit), np.float32(rate))
    return mesh_lib.place(both, self.mesh, mesh_lib.WHOLE)

  @functools.cached_property
  def row_nats(self) -> Callable:
    return jax.jit(self.functions.row_nats, out_shardings=self._everywhere)

  @functools.cached_property
  def probe(self) -> Callable:
    return jax.jit(self.functions.probe, out_shardings=self._everywhere)

  @property
  def _everywhere(self):
    """So that every process can read it."""
    return NamedSharding(self.mesh, mesh_lib.WHOLE)

  @property
  def memory(self):
    """XLA's memory analysis of one update on one device."""
    return self.train_step.memory_analysis()


def build(config: config_lib.Config) -> Programs:
  """Of a run; runs that differ in what is not compiled share them."""
  data = dataclasses.replace(config.data, path='', on_damage='stop')
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
  options = compiler_options(config, mesh)
  return Programs(mesh, functions(config, mesh), options)


def shardings(state: TrainState) -> TrainState:
  """Of the leaves of an abstract state."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def check(config: config_lib.Config, mesh: Mesh):
  """Raises ValueError if the run asks for what its devices cannot do.

  Kernels that cannot serve the model, a way to send tokens that the platform
  does not have, more stages than blocks.
  """
  model, platform = config.model, mesh.devices.flat[0].platform
  if model.connection.streams > 1:
    shape = (1, model.connection.streams, model.dim)
    streams = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
    api.check(model.connection.implementation, streams, mesh)
  if model.moe.transport == 'ragged' and platform == 'cpu':
    raise ValueError(
      "moe.transport='ragged' needs ragged_all_to_all, which XLA has for TPUs "
      "and GPUs but not for cpu: take 'padded' (the same result) or 'auto'"
    )
  stage_layout.of(model, config.mesh)


def functions(
  config: config_lib.Config, mesh: Mesh, *, pollute: bool = False
) -> Functions:
  """The functions of a run on `mesh`, whose devices need not exist.

  `pollute` is for tests, see `pipeline.gradients`.
  """
  model = config.model
  check(config, mesh)
  optimizer = optimizer_lib.make(config.optimizer, config.num_steps)
  learning_rate = optimizer_lib.learning_rate(
    config.optimizer, config.num_steps
  )
  layout = stage_layout.of(model, config.mesh)

  def canonical_init(seed):
    fresh = transformer.Transformer(model, rngs=nnx.Rngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(fresh))
    router_bias = None
    if model.num_moe_blocks:
      router_bias = jnp.zeros((model.num_moe_blocks, model.moe.num_experts))
    return TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params), router_bias
    )

  def specs(tree):
    return mesh_lib.specs(tree, mesh, model.stack, config.mesh.head)

  def rows(reorder):
    """A function of states that reorders every leaf of the stack."""

    def leaf(path, x):
      names = mesh_lib.names(path)
      stacked = mesh_lib.spec(names, model.stack)[:1] == (mesh_lib.PIPE,)
      return reorder(x) if stacked else x

    return functools.partial(jax.tree_util.tree_map_with_path, leaf)

  def abstract(shapes):
    return jax.tree.map(
      lambda leaf, spec: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
      ),
      shapes,
      specs(shapes),
    )

  place, canonical = rows(layout.place), rows(layout.canonical)
  shapes = jax.eval_shape(canonical_init, 0)
  placed = jax.eval_shape(place, shapes)
  param_specs, bias_spec = specs(placed.params), specs(placed).router_bias
  local = loss.build(
    model,
    config.data,
    config.mesh,
    mesh,
    param_specs,
    layout,
    pollute=pollute,
  )
  over_devices = functools.partial(
    jax.shard_map,
    mesh=mesh,
    check_vma=api.knows_axes(model.connection.implementation, mesh),
  )
  loss_and_grads = over_devices(
    local.loss_and_grads,
    in_specs=(param_specs, bias_spec, mesh_lib.BATCH),
    out_specs=(mesh_lib.WHOLE, param_specs, mesh_lib.ROWS),
  )
  row_nats = over_devices(
    local.row_nats,
    in_specs=(param_specs, bias_spec, mesh_lib.BATCH),
    out_specs=mesh_lib.BATCH,
  )
  sites = over_devices(
    local.sites,
    in_specs=(param_specs, bias_spec, mesh_lib.WHOLE),
    out_specs=(mesh_lib.ROWS, mesh_lib.WHOLE),
  )

  def refused(nats, norm, controls):
    """Why the update must not be made: booleans, none if nothing skips."""
    reasons = []
    if config.guards.nonfinite == 'skip_step':
      reasons.append(~(jnp.isfinite(nats) & jnp.isfinite(norm)))
    if config.guards.loss_spike == 'skip_step':
      reasons.append(nats > controls.loss_limit)
    return reasons

  def train_step(state, tokens, controls):
    mean_nats, grads, load = loss_and_grads(
      state.params, state.router_bias, tokens
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    norm = optax.tree.norm(grads)
    metrics = {
      'loss/train': mean_nats,
      'grad/global_norm': norm,
      'optimizer/learning_rate': learning_rate(state.step),
    }
    router_bias = state.router_bias
    if load is not None:
      metrics |= moe.load_metrics(*map(layout.canonical, load))
      if model.moe.router == 'bias':
        router_bias = moe.updated_bias(
          router_bias, load[0], model.moe.bias_speed
        )
    if config.guards.rollback_rate != 1:
      updates = jax.tree.map(lambda leaf: controls.rate * leaf, updates)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(state.step + 1, params, opt_state, router_bias)
    reasons = refused(mean_nats, norm, controls)
    if reasons:
      skip = functools.reduce(jnp.logical_or, reasons)
      new = jax.tree.map(functools.partial(jnp.where, skip), state, new)
      new = new._replace(step=state.step + 1)
      metrics['optimizer/skipped'] = skip.astype(jnp.float32)
    return new, metrics

  def probe(state, tokens):
    stack, before = sites(state.params, state.router_bias, tokens)
    stack = jax.tree.map(layout.canonical, stack)
    if before is not None:
      stack = jax.tree.map(lambda *x: jnp.concatenate(x), before, stack)
    seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stack)
    return gains.profile(seen.res) | {
      'stream_cosine': jnp.mean(seen.cosine, axis=1),
      'stream_rms': jnp.mean(seen.rms, axis=1),
    }

  return Functions(
    abstract_state=abstract(placed),
    canonical_state=abstract(shapes),
    layout=layout,
    abstract_tokens=jax.ShapeDtypeStruct(
      (config.data.batch_size, config.data.seq_len + 1),
      jnp.int32,
      sharding=NamedSharding(mesh, mesh_lib.BATCH),
    ),
    abstract_controls=Controls(
      *2
      * [
        jax.ShapeDtypeStruct(
          (), jnp.float32, sharding=NamedSharding(mesh, mesh_lib.WHOLE)
        )
      ]
    ),
    place=place,
    canonical=canonical,
    init=lambda seed: place(canonical_init(seed)),
    loss_and_grads=loss_and_grads,
    train_step=train_step,
    row_nats=lambda state, tokens: row_nats(
      state.params, state.router_bias, tokens
    ),
    probe=probe,
  )
