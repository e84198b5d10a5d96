"""A run's settings on a mesh: what a step is compiled for.

One static value, from which the two ways to take a gradient (`replicated`,
`pipelined`) and the compiled `Step` read everything that is not an array.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc import config as config_lib
from mhc.kernels import api
from mhc.model import transformer
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.pipeline import stage_layout

Params = dict[str, Any]  # nested; leaves are float32 arrays


@dataclasses.dataclass(frozen=True)
class Placement:
  """A run on a mesh, whose devices need not exist.

  Attributes:
    config: the run's settings.
    mesh: of the axes `axes.AXES`.
  """

  config: config_lib.Config
  mesh: Mesh

  def __post_init__(self):
    """Checks that the devices can do what the run asks for.

    Raises:
      ValueError: kernels that cannot serve the model, a transport that the
        platform does not have, or more stages than blocks.
    """
    model, platform = self.config.model, self.mesh.devices.flat[0].platform
    if model.connection.streams > 1:
      shape = (1, model.connection.streams, model.dim)
      streams = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
      api.check(model.connection.implementation, streams, self.mesh)
    if model.moe.transport == 'ragged_all_to_all' and platform == 'cpu':
      raise ValueError(
        "moe.transport='ragged_all_to_all' is a collective that XLA has for "
        "TPUs and GPUs but not for cpu: take 'all_to_all' (the same result) or "
        "'auto'"
      )
    _ = self.layout

  @property
  def is_pipelined(self) -> bool:
    return self.config.mesh.pipe > 1

  @functools.cached_property
  def layout(self) -> stage_layout.StageLayout:
    """Which device has which blocks."""
    return stage_layout.for_model(self.config.model, self.config.mesh)

  @functools.cached_property
  def graphdef(self) -> nnx.GraphDef:
    return transformer.abstract(self.config.model)[0]

  def merge(self, params: Params) -> transformer.Transformer:
    """The network that has these parameters."""
    return nnx.merge(self.graphdef, nnx.State(params))

  @functools.cached_property
  def num_microbatches(self) -> int:
    """The parts in which a device takes its rows of the batch."""
    config = self.config
    dp_size = self.mesh.size // config.mesh.pipe
    return mesh_lib.num_microbatches(config.mesh, config.data, dp_size)

  @functools.cached_property
  def param_specs(self):
    """How the parameters lie, with the blocks in order of the pipeline."""
    shapes = transformer.abstract(self.config.model)[1]
    return self.specs(jax.eval_shape(self.to_pipeline_order, shapes))

  @property
  def router_bias_spec(self):
    """None without experts."""
    bias = transformer.abstract_router_bias(self.config.model)
    return None if bias is None else partition.LAYERS

  def specs(self, tree):
    """How the leaves of parameters, or of a train state, lie."""
    config = self.config
    return partition.specs(
      tree, self.mesh, config.model.stack, config.mesh.head
    )

  def to_pipeline_order(self, tree):
    """Parameters or a state as saved -> as it trains."""
    return self._reorder(self.layout.to_pipeline_order, tree)

  def to_depth_order(self, tree):
    """Parameters or a state as it trains -> as saved."""
    return self._reorder(self.layout.to_depth_order, tree)

  def _reorder(self, reorder, tree):
    stack = self.config.model.stack
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        reorder(leaf) if partition.is_layered(path, stack) else leaf
      ),
      tree,
    )
