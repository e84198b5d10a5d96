"""The training state, which an update changes and a checkpoint holds."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import optax

from mhc import config as config_lib
from mhc.model import transformer
from mhc.parallel import partition
from mhc.parallel.placement import Params, Placement
from mhc.training import optimizer as optimizer_lib


class TrainState(NamedTuple):
  """Blocks are in pipeline order in training, in depth order when saved."""

  step: jax.Array  # int32 [], of the run; skipped updates count
  params: Params
  opt_state: optax.OptState
  router_bias: jax.Array | None  # float32 [l, e], l blocks with experts


def init(config: config_lib.Config, key: jax.Array) -> TrainState:
  """Initialises a state from a random key, in depth order."""
  model = config.model
  params = initial_parameters(model, key)
  optimizer = optimizer_lib.make(config.optimizer, config.num_steps)
  router_bias = None
  if model.num_moe_blocks:
    router_bias = jnp.zeros(
      (model.num_moe_blocks, model.moe.num_experts), jnp.float32
    )
  return TrainState(
    jnp.zeros((), jnp.int32), params, optimizer.init(params), router_bias
  )


def initial_parameters(model: config_lib.ModelConfig, key: jax.Array) -> Params:
  """The parameters of a new model."""
  fresh = transformer.Transformer(model, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(fresh))


def abstract_model(
  model: config_lib.ModelConfig, device: jax.Device | None = None
) -> TrainState:
  """The abstract state without optimiser, in depth order, on one device."""
  sharding = SingleDeviceSharding(device or jax.devices()[0])
  _, params = transformer.abstract(model)
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),
    params,
    None,
    transformer.abstract_router_bias(model),
  )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    state,
  )


def abstract_saved(p: Placement) -> TrainState:
  """The abstract state in depth order, with shardings."""
  shapes = jax.eval_shape(lambda: init(p.config, jax.random.key(0)))
  return partition.abstract(shapes, p.specs(shapes), p.mesh)


def abstract_training(p: Placement) -> TrainState:
  """The abstract state in pipeline order, with shardings."""
  shapes = jax.eval_shape(
    lambda: p.to_pipeline_order(init(p.config, jax.random.key(0)))
  )
  return partition.abstract(shapes, p.specs(shapes), p.mesh)


def shardings(state: TrainState) -> TrainState:
  """The shardings of the leaves of an abstract state."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)
