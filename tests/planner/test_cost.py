"""Seconds of compiled TPU programs, by hand and of small ones."""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mhc.kernels import chips
from mhc.model import parts
from mhc.planner import breakdown
from mhc.planner import cost
from mhc.planner import hlo
from mhc.planner import targets
from mhc.planner import work

V5P = chips.CHIPS['v5p']
# A cycle is a second, and all else is fast.
SLOW = V5P._replace(clock=1.0, cores=1)

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


def costs(text, chip=SLOW, assumed=cost.NOTHING, **frequencies):
  return cost.Costs(hlo.parse(text, frequencies), chip, assumed)


def test_the_cost_of_a_schedule_by_hand():
  found = costs(MODULE)
  module = found.module
  assert module.entry == 'main'
  assert hlo.trips(module, module.computations['main'][5]) == 7
  total = found.entry
  assert total.high == pytest.approx(10 + 7 * (100 + 5))
  array = 4 * 8 * 128
  # The slice is read, its result stays on chip; each trip reads and writes an
  # array, and counts (4 + 4 + 4 bytes); the kernel says 40 bytes.
  assert total.hbm_bytes == 2 * 128 + 40 + 7 * (2 * array + 12)
  assert total.flops == 300
  assert total.low == pytest.approx(
    (total.hbm_bytes - 40) / V5P.bandwidth
    + max(300 / V5P.flops, 40 / V5P.bandwidth)
  )
  assert total.low < total.middle < total.high
  # The kernel has no cycles.
  kernel = costs(MODULE).each('main')[6]
  assert total.compiler == pytest.approx(
    total.high + kernel.middle - kernel.high
  )


def test_what_has_no_cycles_waits_for_its_bytes():
  """As libtpu writes them of what it gives to SparseCores."""
  known = '"estimated_cycles":"10"'
  assert MODULE.count(known) == 1
  for unknown in (f'"estimated_cycles":"{cost.UNKNOWN}"', '"other":"1"'):
    after = costs(MODULE.replace(known, unknown))
    row = after.each('main')[3]
    before = costs(MODULE).each('main')[3]
    assert (before.high, row.hbm_bytes) == (10, before.hbm_bytes)
    slices = 2 * 128 / V5P.bandwidth
    assert row.low == slices
    assert row.middle >= slices / cost.STREAMED
    assert row.high >= cost.BLIND * slices


def test_a_kernel_takes_its_bundles():
  key = cost.kernel_key(costs(MODULE).module.computations['main'][6])
  assert key == ('kernel', 'f32[8,128]')
  slower = costs(MODULE, assumed=cost.Assumed({key: 50.0})).each('main')[6]
  assert slower.middle == 50
  faster = costs(MODULE, assumed=cost.Assumed({key: 0.0})).each('main')[6]
  assert faster.middle == pytest.approx(40 / V5P.bandwidth / cost.STREAMED)


def test_a_kernel_is_never_free():
  """Without an estimate and a schedule it waits for its operands."""
  silent = MODULE.replace('"cost_estimate"', '"no_estimate"')
  kernel = costs(silent).each('main')[6]
  assert kernel.low == pytest.approx(2 * 4 * 8 * 128 / V5P.bandwidth)
  assert kernel.low < kernel.middle < kernel.high


BRANCH = """\
%branch_{name} (p.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.2 = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  ROOT %inner_{name} = (s32[]{{:T(128)}}, f32[8,128]{{1,0:T(8,128)}}) \
while(%p.2), condition=%condition, body=%body, \
metadata={{op_name="jit(f)/tick/cond/branch_1_fun/{name}/while"}}
}}

"""


def chosen():
  choice = (
    '%chosen = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) conditional(%c,'
    ' %init, %init), branch_computations={%branch_skip, %branch_work},'
    ' metadata={op_name="jit(f)/tick/cond"}\n'
  )
  return MODULE.replace(
    'ENTRY', BRANCH.format(name='skip') + BRANCH.format(name='work') + 'ENTRY'
  ).replace('%kernel =', choice + '  %kernel =')


def test_a_share_is_of_the_scope_directly_around():
  alone = costs(MODULE).entry.high
  loop = 7 * (100 + 5)

  def seconds(**shares):
    return pytest.approx(costs(chosen(), **shares).entry.high - alone)

  assert seconds() == loop
  assert seconds(tick=0.5) == 0.5 * loop
  assert seconds(tick=0.5, work=0.25, skip=0.0) == 0.5 * 0.25 * loop
  assert seconds(other=0.0) == loop


def test_leaves_add_up():
  found = costs(chosen(), tick=0.5)
  leaves = [*found.leaves()]
  total = cost.total(cost.Cost().plus(one.cost, one.times) for one in leaves)
  assert total == pytest.approx(found.entry)
  inside = [one for one in leaves if one.scopes]
  assert {one.scopes for one in inside} == {('tick',)}
  assert {one.times for one in inside} == {0.5, 3.5}  # the loop's trips


def test_a_breakdown_by_hand():
  """Names of parts: own, of what is read, of what reads; none at all."""
  text = MODULE.replace(
    'calls=%fused, ',
    'calls=%fused, metadata={op_name="jit(f)/transpose(jvp(part.head))/'
    'part.attention/checkpoint/rematted_computation/mul"}, ',
  )
  found = breakdown.breakdown(costs(text), SLOW)
  assert set(found.parts) == {*parts.ALL, 'other', 'unknown'}
  seconds = {k: v.seconds for k, v in found.parts.items() if v.seconds}
  assert set(seconds) == {'attention', 'unknown'}
  assert sum(seconds.values()) == pytest.approx(costs(text).entry.middle)
  loop = costs(text).each('body')
  assert found.recompute_seconds == pytest.approx(7 * loop[5].middle)
  assert found.bubble_seconds == found.padding_seconds == 0


def test_idle_devices_and_rows_of_padding():
  text = (
    chosen()
    .replace('tick', 'pipeline_f')
    .replace(
      'calls=%fused, ',
      'calls=%fused, metadata={op_name="jit(f)/part.dense_products/mul"}, ',
    )
  )
  found = costs(text, pipeline_f=0.5)
  shares = breakdown.breakdown(found, SLOW, {'pipeline_f': 0.4}, padded=0.25)
  inside = cost.total(
    cost.Cost().plus(one.cost, one.times)
    for one in found.leaves()
    if one.scopes
  ).middle
  assert shares.bubble_seconds == pytest.approx(0.2 * inside)
  # What has no name counts as what reads it.
  assert shares.padding_seconds == pytest.approx(0.25 * 0.8 * inside)


def test_sizes_of_shapes():
  assert hlo.sizes('(s32[]{:T(128)}, bf16[4,3]{1,0})') == [4, 24]
  assert hlo.sizes('f32[2,128]{1,0:T(2,128)S(1)}') == [0]


@pytest.mark.parametrize(
  ('shapes', 'attributes', 'flops'),
  [
    (('bf16[7,5]', 'bf16[5,3]', 'f32[7,3]'), 'dim_labels=bf_io->bf', 105),
    # A batch of two, as libtpu writes it: dilated, or padded.
    (
      ('bf16[2,7,5]', 'bf16[2,5,3]', 'f32[2,7,3]'),
      'window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf',
      2 * 105,
    ),
    (
      ('bf16[7,5,1]', 'bf16[2,3,5]', 'f32[7,2,3]'),
      'window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0oi->b0f',
      2 * 105,
    ),
    # Two dimensions are summed over.
    (
      ('bf16[4,7,5]', 'bf16[4,5,3]', 'f32[1,7,3]'),
      'window={size=4}, dim_labels=0bf_0io->0bf',
      4 * 105,
    ),
  ],
)
def test_flops_of_products(shapes, attributes, flops):
  left, right, out = shapes
  text = (
    f'HloModule f\n\nENTRY %main (a: {left}, b: {right}) -> {out} {{\n'
    f'  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n'
    f'  ROOT %c = {out} convolution(%a, %b), {attributes}\n}}\n'
  )
  module = hlo.parse(text)
  (*_, product) = module.computations['main']
  found = work.of(module, product, hlo.shapes(module, 'main'))
  assert found.flops == 2 * flops


@pytest.fixture(scope='module')
def compiled():
  """Work that the compiler gives no cycles to, and large products."""

  def program(rows, index, a, b, experts, sizes):
    double = pl.pallas_call(
      lambda x, o: o.__setitem__(..., 2 * x[...]),
      jax.ShapeDtypeStruct((256, 256), jnp.float32),
      name='double',
    )
    return (
      rows[index],
      jnp.argsort(index),
      jnp.zeros_like(rows).at[index].add(rows),
      double(rows[:256, :256]),
      a @ b,
      jax.lax.ragged_dot(a, experts, sizes),
    )

  mesh = Mesh(
    np.array(targets.devices('v5p:2x2x1')[:1]), 'x', axis_types=(AxisType.Auto,)
  )
  struct = functools.partial(
    jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec())
  )
  square = struct((8192, 8192), jnp.bfloat16)
  rows, index = struct((8192, 512), jnp.float32), struct((8192,), jnp.int32)
  experts = struct((4, 8192, 1024), jnp.bfloat16), struct((4,), jnp.int32)
  lowered = jax.jit(program).lower(rows, index, square, square, *experts)
  return cost.Costs(hlo.parse(lowered.compile().as_text()), V5P)


@pytest.mark.parametrize('what', ['gather', 'sort', 'scatter', 'double'])
def test_nothing_is_free(compiled, what):
  found = [
    leaf
    for leaf in compiled.leaves()
    if what in leaf.instruction.name or what in leaf.instruction.attributes
  ]
  seconds = sum(leaf.times * leaf.cost.middle for leaf in found)
  assert seconds > 1e-7
  lower = sum(leaf.times * leaf.cost.low for leaf in found)
  higher = sum(leaf.times * leaf.cost.high for leaf in found)
  assert 0 < lower <= seconds <= higher


def test_a_large_product_is_near_the_peak(compiled):
  ideal = 2 * 8192**3 / V5P.flops
  product = max(compiled.leaves(), key=lambda leaf: leaf.cost.flops)
  assert product.cost.flops == 2 * 8192**3
  assert product.cost.low == pytest.approx(ideal)
  assert 1.0 <= product.cost.middle / ideal <= 1.15


def test_a_grouped_product_is_no_nearer(compiled):
  """Of 8192 rows in four groups, with tiles that two of them share."""
  (product,) = (
    leaf
    for leaf in compiled.leaves()
    if leaf.instruction.name.startswith('ragged-dot') and leaf.cost.flops
  )
  ideal = 2 * 8192**2 * 1024 / V5P.flops
  tiles = 1 + 3 * cost.RAGGED_ROWS / 8192
  assert product.cost.low == pytest.approx(ideal)
  assert product.cost.middle == pytest.approx(ideal * tiles / cost.RAGGED)
  plain = max(compiled.leaves(), key=lambda leaf: leaf.cost.flops).cost
  assert product.cost.middle / ideal >= plain.middle / plain.low - 0.01
