"""Where the blocks of a pipeline are."""

import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.pipeline import stage_layout
from mhc.pipeline import transfers


@pytest.mark.parametrize('placement', ['linear', 'loop', 'vshape'])
@pytest.mark.parametrize('num_devices', [1, 2, 4])
@pytest.mark.parametrize(('num_blocks', 'before'), [(8, 0), (29, 1), (11, 3)])
def test_there_and_back(placement, num_devices, num_blocks, before):
  chunks = 1 if placement == 'linear' else 2
  made = stage_layout.StageLayout(
    num_blocks, before, num_devices, chunks, placement
  )
  stack = jnp.arange(1.0, 2 * num_blocks + 1).reshape(num_blocks, 2)
  placed = made.to_pipeline_order(stack)
  assert placed.shape == (num_devices * chunks * made.layers_per_stage, 2)
  np.testing.assert_array_equal(made.to_depth_order(placed), stack)
  padding = np.asarray(placed)[made.depth_index < 0]
  np.testing.assert_array_equal(padding, np.zeros_like(padding))


def test_stages_follow_each_other():
  """Each device's rows, in the order of the stages, are the blocks in order."""
  made = stage_layout.StageLayout(16, 0, 4, 2, 'vshape')
  order = made.depth_index.reshape(4, 2, 2)
  blocks = np.empty((8, 2))
  for device in range(4):
    for chunk in range(2):
      stage = transfers.stage_of('vshape', 4, device, chunk)
      blocks[stage] = order[device, chunk]
  np.testing.assert_array_equal(blocks.ravel(), np.arange(16))


def test_stages_are_even_with_what_else_they_do():
  """The first also has the blocks before the stack, the last ones the head."""
  assert stage_layout.StageLayout(29, 1, 4, 2, 'loop').stages == (
    3,
    4,
    4,
    4,
    4,
    4,
    3,
    3,
  )
  assert stage_layout.StageLayout(29, 1, 5, 2, 'loop').stages == (2, *(3,) * 9)
  assert stage_layout.StageLayout(7).stages == (7,)
  assert stage_layout.StageLayout(7).is_depth_order


def test_a_stage_without_blocks():
  message = r'4 pipeline devices with 2 stage.* are 8 stages.* 6 blocks'
  with pytest.raises(ValueError, match=message):
    stage_layout.StageLayout(5, 1, 4, 2, 'loop')


def test_of_a_model():
  model = config.ModelConfig(
    num_blocks=9, moe=config.MoEConfig(num_experts=4, num_dense_blocks=2)
  )
  mesh = config.MeshConfig(pipe=2, schedule='wave_v')
  made = stage_layout.for_model(model, mesh)
  assert (made.num_blocks, made.num_before) == (7, 2)
  assert (made.num_chunks, made.placement) == (2, 'vshape')
  assert stage_layout.for_model(model, config.MeshConfig()).is_depth_order
