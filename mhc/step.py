"""The compiled programs of a run: initialise, update, score, probe.

`jax.shard_map` is manual over the whole mesh and wraps the loss and its
gradient: inside, a batch is the local one and sums over devices are written
out. The update is plain jit on arrays that are whole on every device.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import optax

from mhc import config as config_lib
from mhc import gains
from mhc import moe
from mhc import optimizer as optimizer_lib
from mhc import precision
from mhc import sharding
from mhc import transformer
from mhc.kernels import dispatch

Params = dict[str, Any]  # nested; leaves are float32 arrays


class TrainState(NamedTuple):
  step: jax.Array  # int32 [], updates done
  params: Params
  opt_state: optax.OptState
  router_bias: jax.Array | None  # float32 [l, e] of the l blocks with experts


class Functions(NamedTuple):
  """What a run executes, not yet compiled; t is `seq_len`.

  init: seed -> state.
  train_step: state, tokens int32 [b, t + 1] -> state, metrics.
  row_nats: state, tokens int32 [b, t + 1] -> float32 [b], the summed negative
    log-likelihood of each row's t targets.
  probe: state, tokens int32 [1, t] -> `gains.profile` of H_res on them.
  """

  abstract_state: TrainState  # of jax.ShapeDtypeStruct, with shardings
  abstract_tokens: jax.ShapeDtypeStruct
  init: Callable
  train_step: Callable
  row_nats: Callable
  probe: Callable

  @property
  def state_shardings(self) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

  def lower(self) -> jax.stages.Lowered:
    """The update from abstract shapes; it donates the state."""
    update = jax.jit(
      self.train_step,
      donate_argnums=0,
      out_shardings=(self.state_shardings, None),
    )
    return update.lower(self.abstract_state, self.abstract_tokens)


@dataclasses.dataclass(frozen=True)
class Programs:
  """`Functions`, each compiled when it is first asked for."""

  mesh: Mesh
  functions: Functions

  @property
  def abstract_state(self) -> TrainState:
    return self.functions.abstract_state

  @functools.cached_property
  def init(self) -> Callable:
    return jax.jit(
      self.functions.init,
      static_argnums=0,
      out_shardings=self.functions.state_shardings,
    )

  @functools.cached_property
  def train_step(self) -> jax.stages.Compiled:
    """Donates the state."""
    return self.functions.lower().compile()

  @functools.cached_property
  def row_nats(self) -> Callable:
    return jax.jit(self.functions.row_nats)

  @functools.cached_property
  def probe(self) -> Callable:
    return jax.jit(self.functions.probe)

  @property
  def memory(self):
    """XLA's memory analysis of one update on one device."""
    return self.train_step.memory_analysis()


def build(config: config_lib.Config) -> Programs:
  """Of a run; runs that differ in the seed share them."""
  return _build(
    config.model,
    config.optimizer,
    config.num_steps,
    dataclasses.replace(config.data, path=''),
    config.num_devices,
    config.num_expert_shards,
  )


@functools.lru_cache(maxsize=8)
def _build(model, optimizer, num_steps, data, num_devices, num_expert_shards):
  mesh = sharding.make_mesh(num_devices, data, num_expert_shards)
  return Programs(mesh, functions(model, optimizer, num_steps, data, mesh))


def check_kernels(model: config_lib.ModelConfig, mesh: Mesh):
  """Raises ValueError if the model asks for kernels that cannot serve it."""
  if model.connection.streams > 1:
    shape = (1, model.connection.streams, model.dim)
    streams = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
    dispatch.check(model.connection.implementation, streams, mesh)


def functions(
  model: config_lib.ModelConfig,
  optimizer_config: config_lib.OptimizerConfig,
  num_steps: int,
  data: config_lib.DataConfig,
  mesh: Mesh,
) -> Functions:
  """The functions of a run on `mesh`, whose devices need not exist."""
  check_kernels(model, mesh)
  optimizer = optimizer_lib.make(optimizer_config, num_steps)
  learning_rate = optimizer_lib.learning_rate(optimizer_config, num_steps)
  create = functools.partial(transformer.Transformer, model)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))

  def network(params):
    return nnx.merge(graphdef, nnx.State(params))

  def init(seed):
    fresh = create(rngs=nnx.Rngs(jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(fresh))
    router_bias = None
    if model.num_moe_blocks:
      router_bias = jnp.zeros((model.num_moe_blocks, model.moe.num_experts))
    return TrainState(
      jnp.zeros((), jnp.int32), params, optimizer.init(params), router_bias
    )

  shapes = jax.eval_shape(init, 0)
  param_specs = sharding.specs(shapes.params)
  abstract_state = jax.tree.map(
    lambda leaf, spec: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    ),
    shapes,
    sharding.specs(shapes),
  )

  def nats_and_stats(params, router_bias, tokens):
    logits, stats = network(params).logits_and_stats(
      tokens[:, :-1], router_bias
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    )
    return precision.mark('loss', jnp.sum(nats, axis=1)), stats

  def gradient(params, router_bias, tokens):
    """Of the sum over local tokens, with that sum and the experts' loads."""

    def objective(params):
      rows, stats = nats_and_stats(params, router_bias, tokens)
      nats = jnp.sum(rows)
      total, load = nats, None
      if stats is not None:
        load = (stats.load, stats.dropped)
        if model.moe.balance_loss:
          balance = jnp.sum(stats.balance_loss) * rows.size * data.seq_len
          total = total + model.moe.balance_loss * balance
      return total, (nats, load)

    grads, (nats, load) = jax.grad(objective, has_aux=True)(params)
    return nats, grads, load

  def local_loss_and_grads(params, router_bias, tokens):
    # The local gradient first, then one sum over devices: parameters must vary
    # over the mesh, or autodiff would sum at every use of them.
    params, router_bias = _varying((params, router_bias))
    parts = sharding.microbatches(tokens, data)
    if len(parts) == 1:
      nats, grads, load = gradient(params, router_bias, tokens)
    else:
      zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, router_bias, parts[0]),
      )

      def add(total, part):
        one = gradient(params, router_bias, part)
        return jax.tree.map(jnp.add, total, one), None

      (nats, grads, load), _ = jax.lax.scan(add, _varying(zeros), parts)
    scale = 1 / (data.batch_size * data.seq_len)
    nats = jax.lax.psum(nats, sharding.AXES) * scale
    # Over the devices that have the same part of a parameter.
    grads = jax.tree.map(
      lambda leaf, spec: (
        jax.lax.psum(
          leaf, sharding.AXES if spec == sharding.WHOLE else sharding.DATA
        )
        * scale
      ),
      grads,
      param_specs,
    )
    if load is not None:
      counts, dropped = _varying(load)
      load = (
        jax.lax.psum(counts, sharding.AXES),
        jax.lax.pmean(dropped, sharding.AXES) / len(parts),
      )
    return nats, grads, load

  over_devices = functools.partial(
    jax.shard_map,
    mesh=mesh,
    check_vma=dispatch.knows_axes(model.connection.implementation, mesh),
  )
  loss_and_grads = over_devices(
    local_loss_and_grads,
    in_specs=(param_specs, sharding.WHOLE, sharding.BATCH),
    out_specs=(sharding.WHOLE, param_specs, sharding.WHOLE),
  )

  def train_step(state, tokens):
    loss, grads, load = loss_and_grads(state.params, state.router_bias, tokens)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      'loss/train': loss,
      'grad/global_norm': optax.tree.norm(grads),
      'optimizer/learning_rate': learning_rate(state.step),
    }
    router_bias = state.router_bias
    if load is not None:
      metrics |= moe.load_metrics(*load)
      if model.moe.router == 'bias':
        router_bias = moe.updated_bias(
          router_bias, load[0], model.moe.bias_speed
        )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, router_bias), metrics

  def local_nats(params, router_bias, tokens):
    def score(part):
      return nats_and_stats(params, router_bias, part)[0]

    parts = sharding.microbatches(tokens, data)
    if len(parts) == 1:
      return score(tokens)
    return jax.lax.map(score, parts).reshape(-1)

  row_nats = over_devices(
    local_nats,
    in_specs=(param_specs, sharding.WHOLE, sharding.BATCH),
    out_specs=sharding.BATCH,
  )

  def probe(state, tokens):
    matrices = network(state.params).mixing_matrices(tokens, state.router_bias)
    return gains.profile(matrices)

  return Functions(
    abstract_state=abstract_state,
    abstract_tokens=jax.ShapeDtypeStruct(
      (data.batch_size, data.seq_len + 1),
      jnp.int32,
      sharding=NamedSharding(mesh, sharding.BATCH),
    ),
    init=init,
    train_step=train_step,
    row_nats=lambda state, tokens: row_nats(
      state.params, state.router_bias, tokens
    ),
    probe=probe,
  )


def _varying(tree):
  """Every leaf as one that may differ between any two devices."""

  def leaf(x):
    missing = set(sharding.AXES) - jax.typeof(x).mat.varying
    return jax.lax.pcast(x, tuple(missing), to='varying') if missing else x

  return jax.tree.map(leaf, tree)
