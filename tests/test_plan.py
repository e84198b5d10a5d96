"""Steps compiled for machines that are not here, and their HLO read."""

import dataclasses

import jax
import pytest

from mhc import config
from mhc import hlo
from mhc import plan

pytestmark = pytest.mark.usefixtures('optax_promotion')

TINY = config.Config(
  num_steps=40,
  model=config.ModelConfig(
    num_blocks=4,
    dim=128,
    ffn_dim=128,
    dtype='bfloat16',
    recompute='none',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
    ),
    connection=config.ConnectionConfig(kind='residual'),
  ),
  data=config.DataConfig(seq_len=128, batch_size=4),
)


@pytest.fixture(scope='module')
def sliced():
  with jax.numpy_dtype_promotion('standard'):  # for optax
    return plan.make(TINY, 'v5e:2x2')


def test_a_tpu_slice(sliced):
  assert sliced['devices'] == 4
  assert sliced['total_params'] > 0
  # Parameters, both moments and a token batch, whole on every device.
  state = 12 * sliced['total_params']
  assert state < sliced['argument_bytes'] < 1.2 * state
  assert sliced['peak_bytes'] > sliced['argument_bytes']
  assert 0 < sliced['optimal_seconds'] < 1
  assert 1e-5 < sliced['scheduled_seconds'] < 1
  assert sliced['bytes_moved'] > sliced['argument_bytes']
  text = plan.table(sliced)
  assert 'v5e:2x2' in text
  assert f'{sliced["total_params"]:,}' in text


def test_loops_count_in_full(sliced):
  """Twice the blocks in the same loops: XLA's total stays, ours grows."""
  deeper = plan.make(
    dataclasses.replace(
      TINY, model=dataclasses.replace(TINY.model, num_blocks=8)
    ),
    'v5e:2x2',
  )
  assert deeper['bytes_moved'] > 1.3 * sliced['bytes_moved']
  assert deeper['scheduled_seconds'] > 1.2 * sliced['scheduled_seconds']


def test_the_cpu_is_a_topology():
  result = plan.make(TINY, 'cpu')
  assert result['scheduled_seconds'] is None
  assert result['bytes_accessed'] > 0
  assert '| - |' in plan.table(result)


def test_impossible_topologies():
  with pytest.raises(ValueError, match=r"'v5q:2x2'.*v5p:2x2x1"):
    plan.make(TINY, 'v5q:2x2')
  with pytest.raises(ValueError, match=r'num_devices=8.*4 tpu'):
    plan.make(
      dataclasses.replace(TINY, mesh=config.MeshConfig(num_devices=8)),
      'v5e:2x2',
    )


MODULE = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %next = s32[]{:T(128)} add(%i, %one), backend_config={"estimated_cycles":"5"}
  %y = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(7)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%fused (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %m = f32[8,128]{1,0:T(8,128)} multiply(%a, %a)
}

%slicing (b: bf16[64,128]) -> bf16[1,128] {
  %b = bf16[64,128]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %s = bf16[1,128]{1,0} dynamic-slice(%b, %zero, %zero)
}

ENTRY %main (x: f32[8,128], w: bf16[64,128]) -> f32[8,128] {
  %x.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %w = bf16[64,128]{1,0} parameter(1)
  %c = s32[]{:T(128)} constant(0)
  %row = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kLoop, \
calls=%slicing, backend_config={"estimated_cycles":"10"}
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%c, %x.1)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[8,128]{1,0:T(8,128)}) \
while(%init), condition=%condition, body=%body
  %kernel = f32[8,128]{1,0} custom-call(%x.1), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":\
{"flops":"300","transcendentals":"0","bytes_accessed":"40"}}
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_the_cost_of_a_schedule_by_hand():
  module = hlo.parse(MODULE)
  assert module.entry == 'main'
  assert hlo.trips(module, module.computations['main'][5]) == 7
  cost = hlo.cost(module)
  assert cost.cycles == 10 + 7 * (100 + 5)
  array = 4 * 8 * 128
  # The slice is read, its result stays on chip; the kernel and each trip read
  # and write an array, and a trip also counts (4 + 4 + 4 bytes).
  assert cost.bytes == 2 * 128 + 2 * array + 7 * (2 * array + 12)
  assert (cost.kernel_flops, cost.kernel_bytes) == (300, 40)


def test_sizes_of_shapes():
  assert hlo.sizes('(s32[]{:T(128)}, bf16[4,3]{1,0})') == [4, 24]
  assert hlo.sizes('f32[2,128]{1,0:T(2,128)S(1)}') == [0]
