"""Which device of a pipeline holds which transformer block.

A stack of L blocks is cut into p v stages, v on each of p devices. It is
initialised, and lies in a checkpoint, in order of depth. It trains in the order
of the pipeline: row

    (device * v + chunk) * r + position      of p v r rows,

r the blocks of the longest stage, so that a split of the rows over p devices
gives each its own stages. A shorter stage ends in rows of zeros, which are
never computed. Stages differ where p v does not divide L: the first is shorter
by the blocks that stand before the stack (it computes those as well), then the
last ones are, next to the head.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mhc import config as config_lib
from mhc.pipeline import schedules
from mhc.pipeline import table as table_lib


@dataclasses.dataclass(frozen=True)
class StageLayout:
  """The layout of `num_blocks` stacked blocks behind `num_before` others.

  Raises:
    ValueError: some stage would be left without a block.
  """

  num_blocks: int
  num_before: int = 0
  num_devices: int = 1
  num_chunks: int = 1
  placement: table_lib.Placement = 'linear'

  def __post_init__(self):
    number = self.num_devices * self.num_chunks
    total = self.num_before + self.num_blocks
    if number > total + 1 or min(self.stages[1:], default=1) < 1:
      raise ValueError(
        f'mesh.pipe={self.num_devices} pipeline devices with {self.num_chunks} '
        f'stage(s) each are {number} stages, more than the {total} blocks can '
        f'fill (model.num_blocks={total}, the last {self.num_blocks} of which '
        'are spread over the stages): lower mesh.pipe or mesh.chunks, or take '
        'a schedule with one stage a device'
      )

  @functools.cached_property
  def stages(self) -> tuple[int, ...]:
    """The number of stacked blocks of every stage."""
    number, before = self.num_devices * self.num_chunks, self.num_before
    longest = -(-(self.num_blocks + before) // number)
    stages = [max(0, longest - before)] + [longest] * (number - 1)
    excess, stage = sum(stages) - self.num_blocks, number - 1
    while excess > 0:
      stages[stage] -= 1
      excess -= 1
      stage = stage - 1 if stage > 1 else number - 1
    return tuple(stages)

  @property
  def layers_per_stage(self) -> int:
    """Rows of one stage, padding included."""
    return max(self.stages)

  @functools.cached_property
  def depth_index(self) -> np.ndarray:
    """The depth of every row's block, -1 for padding; int32."""
    starts = np.cumsum((0, *self.stages))
    order = np.full(
      (self.num_devices, self.num_chunks, self.layers_per_stage), -1
    )
    for device in range(self.num_devices):
      for chunk in range(self.num_chunks):
        stage = table_lib.stage_of(
          self.placement, self.num_devices, device, chunk
        )
        size = self.stages[stage]
        order[device, chunk, :size] = starts[stage] + np.arange(size)
    return order.reshape(-1).astype(np.int32)

  @property
  def is_depth_order(self) -> bool:
    return np.array_equal(self.depth_index, np.arange(self.num_blocks))

  def to_pipeline_order(self, stack: jax.Array) -> jax.Array:
    """[l, ...] in order of depth -> rows of the pipeline."""
    if self.is_depth_order:
      return stack
    # Rows past the end read as zeros.
    order = np.where(self.depth_index < 0, self.num_blocks, self.depth_index)
    return jnp.take(
      stack, order, axis=0, mode='fill', fill_value=0, unique_indices=False
    )

  def to_depth_order(self, stack: jax.Array) -> jax.Array:
    """Rows -> [l, ...] in order of depth."""
    if self.is_depth_order:
      return stack
    return jnp.take(
      stack, np.argsort(self.depth_index)[-self.num_blocks :], axis=0
    )


def for_model(
  model: config_lib.ModelConfig, mesh: config_lib.MeshConfig
) -> StageLayout:
  """The layout of a model's stack on a mesh.

  Raises:
    ValueError: there are more stages than blocks.
  """
  num_blocks = model.num_moe_blocks or model.num_blocks
  if mesh.pipe == 1:
    return StageLayout(num_blocks)
  spec = schedules.SCHEDULES[mesh.schedule]
  try:
    return StageLayout(
      num_blocks,
      model.num_blocks - num_blocks,
      mesh.pipe,
      spec.chunks or mesh.chunks,
      spec.placement,
    )
  except ValueError as error:
    raise ValueError(f'mesh.schedule={mesh.schedule!r}: {error}') from error
