"""Collectives of compiled steps: by hand, and of a real schedule."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc.kernels import chips
from mhc.parallel import ici
from mhc.planner import collectives
from mhc.planner import cost
from mhc.planner import hlo
from mhc.planner import targets

V5P = chips.CHIPS['v5p']
# A microsecond of one link, and of compute.
MEGA = 1e-6
SHAPE = 'bf16[45,1000]{1,0:T(8,128)(2,1)}'
BYTES = 90_000.0
assert V5P.ici_bandwidth * MEGA == BYTES
BACKEND = 'backend_config={"estimated_cycles":"%d"}'


def place(generation, *extents, cores=1):
  """A torus, and the numbers of its devices, which are in order."""
  places = np.array([at for at in np.ndindex(*extents) for _ in range(cores)])
  numbers = np.arange(len(places)).reshape(*extents, cores)
  return ici.make_torus(places, chips.CHIPS[generation]), numbers


def rows(numbers):
  return numbers.reshape(-1, numbers.shape[-1])


def shifts(groups, hops):
  """Everybody to the one so far along its row."""
  moved = np.roll(groups, -hops, axis=1)
  return np.stack([groups.ravel(), moved.ravel()], axis=1)


def test_rings_are_what_wraps():
  assert place('v5p', 4, 4, 8)[0].rings == (True, True, True)
  assert place('v5p', 2, 4, 4)[0].rings == (False, False, False)
  assert place('v5e', 16, 8, 1)[0].rings == (True, False, False)
  assert place('tpu7x', 4, 4, 4, cores=2)[0].devices_per_chip == 2


def test_the_span_of_a_group():
  at, numbers = place('v5p', 8, 4, 4)
  numbers = numbers[..., 0]
  whole, half = ici.Span(2, 4, 1, True), ici.Span(0, 4, 1, False)
  assert ici.spans(at, numbers[0, 0]) == (whole,)
  assert ici.spans(at, numbers[:4, 0, 0]) == (half,)
  assert ici.spans(at, numbers[:4, 0].ravel()) == (half, whole)
  assert ici.spans(at, numbers[[6, 7, 0, 1], 0, 0]) == (half,)  # the seam
  assert ici.spans(at, numbers[::2, 0, 0]) == (ici.Span(0, 4, 2, True),)
  assert ici.spans(at, numbers[[0, 1, 3], 0, 0]) is None
  assert ici.spans(at, np.array([0, 1, 4])) is None  # an L
  assert ici.spans(at, np.array([5])) == ()


def test_gathering_uses_every_link_of_the_group():
  at, numbers = place('v5p', 4, 4, 4)

  def seconds(at, groups):
    return ici.all_gather(at, groups, BYTES).seconds / MEGA

  assert seconds(at, numbers.reshape(16, 4)) == pytest.approx(3 / 4 / 2)
  assert seconds(at, numbers.reshape(4, 16)) == pytest.approx(15 / 16 / 4)
  assert seconds(at, numbers.reshape(1, 64)) == pytest.approx(63 / 64 / 6)
  # Two of a ring, opposite each other: half of the bytes, which use half of
  # both ways, and so do three other pairs.
  pairs = numbers[::2, :, :, 0].transpose(1, 2, 0).reshape(-1, 2)
  assert seconds(at, pairs) == pytest.approx(1 / 2 * 2 / 2)
  line, numbers = place('v5p', 2, 2, 1)
  assert seconds(line, numbers.reshape(2, 2)) == pytest.approx(1 / 2)
  assert seconds(line, numbers.reshape(1, 4)) == pytest.approx(3 / 4 / 2)
  # Three chips in an L pass thirds on, twice; 3 to 0 crosses what 0 to 1 does.
  bent = ici.all_gather(line, np.array([[0, 1, 3]]), BYTES)
  assert bent.seconds / MEGA == pytest.approx(2 / 3)


def test_devices_of_a_chip_share_its_links():
  at, numbers = place('tpu7x', 4, 4, 4, cores=2)
  chip = numbers.reshape(64, 2)
  assert ici.all_gather(at, chip, BYTES) == ici.LinkUse(0, frozenset())
  both = ici.all_gather(at, numbers.reshape(16, 8), BYTES)
  assert both.seconds / MEGA == pytest.approx(3 / 4 / 2)
  each = rows(numbers.transpose(0, 1, 3, 2))
  assert ici.all_gather(at, each, BYTES).seconds == pytest.approx(
    2 * both.seconds
  )
  assert ici.permute(at, shifts(each, 1), BYTES).seconds / MEGA == (
    pytest.approx(2)
  )
  assert ici.permute(at, chip, BYTES).seconds == 0


def test_messages_share_the_links_on_their_way():
  at, numbers = place('v5p', 4, 4, 4)
  row = rows(numbers[..., 0])
  for hops, seconds, link in ((1, 1, (2, 0)), (2, 2, (2, 0)), (3, 1, (2, 1))):
    use = ici.permute(at, shifts(row, hops), BYTES)
    assert use.seconds / MEGA == pytest.approx(seconds)
    assert use.links == {link}
  # The way back of a line is free for the one that closes it.
  line, numbers = place('v5e', 4, 4, 1)
  use = ici.permute(line, shifts(numbers[:, :, 0, 0], 1), BYTES / 2)
  assert use.seconds / MEGA == pytest.approx(1)
  assert use.links == {(1, 0), (1, 1)}


@pytest.mark.parametrize('size', [4, 8, 16])
def test_an_exchange_on_rings_and_lines(size):
  ring, numbers = place('v5p', 4, 4, size)
  use = ici.all_to_all(ring, rows(numbers[..., 0]), BYTES)
  assert use.seconds / MEGA == pytest.approx(size / 8)
  assert use.links == {(2, 0), (2, 1)}
  # Of two dimensions the longer one.
  plane = ici.all_to_all(ring, numbers.reshape(4, 4 * size), BYTES)
  assert plane.seconds / MEGA == pytest.approx(size / 8)
  line, numbers = place('v5p', 2, 2, size)
  use = ici.all_to_all(line, rows(numbers[..., 0]), BYTES)
  assert use.seconds / MEGA == pytest.approx(size / 4)


@pytest.mark.parametrize(
  ('text', 'groups'),
  [
    ('{{0,2},{1,3}}', [[0, 2], [1, 3]]),
    ('{}', [[0, 1, 2, 3]]),
    ('', [[0, 1, 2, 3]]),
    ('[2,2]<=[4]', [[0, 1], [2, 3]]),
    ('[2,2]<=[2,2]T(1,0)', [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
    ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
    (
      "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}",
      [[0, 1], [2, 3]],
    ),
  ],
)
def test_notations_of_groups(text, groups):
  attributes = f', channel_id=1, replica_groups={text}, dimensions={{0}}'
  assert hlo.devices(attributes) == text
  assert hlo.groups(text, 4).tolist() == groups


@pytest.fixture(scope='module')
def mesh():
  """64 chips; 'data' lies on two rings, 'pipe' on the third."""
  devices = targets.devices('v5p:4x4x4')
  devices = sorted(devices, key=lambda device: tuple(device.coords))
  return Mesh(np.array(devices).reshape(16, 4), ('data', 'pipe'))


def test_the_axes_of_a_mesh_lie_on_rings(mesh):
  x, y, z = (ici.Span(dimension, 4, 1, True) for dimension in range(3))
  assert collectives.rings(mesh, ('pipe',), V5P) == (z,)
  assert collectives.rings(mesh, ('data',), V5P) == (x, y)
  assert collectives.rings(mesh, ('pipe', 'data'), V5P) == (x, y, z)


PIPE = "replica_groups=mesh['data'=16,'pipe'=4] {'pipe'}"
DATA = 'replica_groups=[4,16]<=[16,4]T(1,0)'
ALL = 'replica_groups={}'


def pairs(hops=1):
  """Every stage to the next."""
  to = [
    f'{{{4 * row + i},{4 * row + (i + hops) % 4}}}'
    for row in range(16)
    for i in range(4)
  ]
  return f'source_target_pairs={{{",".join(to)}}}'


def read(mesh, entry, *computations):
  """The collectives of a program with one array, %x."""
  text = [
    'HloModule jit_f, is_scheduled=true',
    *computations,
    'ENTRY %main (x: bf16[45,1000]) -> bf16[45,1000] {',
    f'  %x = {SHAPE} parameter(0)',
    *(f'  {line}' for line in entry),
    '}',
  ]
  module = hlo.parse('\n'.join(text))
  costs = cost.Costs(module, V5P)
  found = collectives.collectives(costs, mesh)
  assert collectives.step_seconds(costs, mesh) == pytest.approx(
    costs.entry.middle + collectives.exposed_seconds(found)
  )
  return found


def computation(name, *lines):
  return '\n'.join(
    [
      f'%{name} (p: {SHAPE}) -> {SHAPE} {{',
      f'  %p = {SHAPE} parameter(0)',
      *(f'  {line}' for line in lines),
      '}',
    ]
  )


def fusion(name, microseconds, of='x'):
  """Compute."""
  cycles = microseconds * V5P.clock * MEGA
  return (
    f'%{name} = {SHAPE} fusion(%{of}), kind=kLoop, calls=%fused, '
    + BACKEND % cycles
  )


# A product, whose cycles are taken as they are.
PRODUCT = (
  '%w = bf16[1000,1000]{1,0} constant({...})',
  f'ROOT %m = {SHAPE} convolution(%p, %w), dim_labels=bf_io->bf',
)
FUSED = computation('fused', *PRODUCT)


@pytest.mark.parametrize(
  ('kind', 'devices', 'axes', 'sent', 'microseconds'),
  [
    ('all-gather', PIPE, ('pipe',), 3, 4 * 3 / 4 / 2),
    ('all-gather', DATA, ('data',), 15, 16 * 15 / 16 / 4),
    ('all-gather', ALL, ('data', 'pipe'), 63, 64 * 63 / 64 / 6),
    ('reduce-scatter', PIPE, ('pipe',), 3 / 4, 3 / 4 / 2),
    ('all-reduce', DATA, ('data',), 2 * 15 / 16, 2 * 15 / 16 / 4),
    ('all-to-all', PIPE, ('pipe',), 3 / 4, 4 / 8),
    ('all-to-all', DATA, ('data',), 15 / 16, 4 / 8),
    ('collective-permute', pairs(), ('pipe',), 1, 1),
    ('collective-permute', pairs(2), ('pipe',), 1, 2),
  ],
)
def test_a_collective_of_each_kind(
  mesh, kind, devices, axes, sent, microseconds
):
  """Alone, with a start and a done, and on the SparseCores."""
  rest = f'channel_id=1, {devices}, dimensions={{0}}'
  alone = [f'ROOT %c = {SHAPE} {kind}(%x), {rest}']
  split = [
    f'%c = ({SHAPE}, {SHAPE}, u32[]{{:S(2)}}) {kind}-start(%x), {rest}',
    fusion('a', 2),
    f'ROOT %done = {SHAPE} {kind}-done(%c)',
  ]
  called = [
    '%c = ((), (), s32[]{:S(2)}) call-start(), '
    'async_execution_thread="sparsecore", to_apply=%sparse',
    fusion('before', 7),  # it has nothing to send yet
    f'%u = (({SHAPE}), {SHAPE}) call-update(%c, %x)',
    fusion('a', 2),
    f'ROOT %done = {SHAPE} call-done(%u)',
  ]
  sparse = computation('sparse', f'ROOT %i = {SHAPE} {kind}(%p), {rest}')
  for entry, overlapped in ((alone, 0), (split, 2), (called, 2)):
    (one,) = read(mesh, entry, FUSED, sparse)
    assert (one.name, one.kind, one.axes) == ('c', kind, axes)
    assert one.bytes == pytest.approx(sent * BYTES)
    assert one.times == 1
    assert one.seconds / MEGA == pytest.approx(microseconds)
    assert one.overlapped / MEGA == pytest.approx(overlapped)


def test_a_ragged_exchange_fills_the_smaller_side(mesh):
  wide = 'bf16[180,1000]{1,0}'
  (one,) = read(
    mesh,
    [
      f'%room = {wide} broadcast(%x)',
      '%n = s32[4]{0:T(128)S(6)} constant({1,2,3,4})',
      f'ROOT %c = {wide} ragged-all-to-all(%x, %room, %n, %n, %n, %n), {PIPE}',
    ],
  )
  assert one.kind == 'ragged-all-to-all'
  assert one.bytes == pytest.approx(3 / 4 * BYTES)
  assert one.seconds / MEGA == pytest.approx(4 / 8)


def test_arrays_on_chip_count(mesh):
  local = SHAPE.replace(')}', ')S(1)}')
  (one,) = read(
    mesh,
    [f'%y = {local} copy(%x)', f'ROOT %c = {SHAPE} all-to-all(%y), {PIPE}'],
  )
  assert one.bytes == pytest.approx(3 / 4 * BYTES)


def test_a_fused_reduction_and_slice_is_a_reduce_scatter(mesh):
  body = computation(
    'all-reduce-scatter',
    f'%r = {SHAPE} all-reduce(%p), {PIPE}',
    'ROOT %d = bf16[9,1000]{1,0} dynamic-slice(%r)',
  )
  (one,) = read(
    mesh,
    [
      'ROOT %f = bf16[9,1000]{1,0} fusion(%x), kind=kCustom, '
      'calls=%all-reduce-scatter'
    ],
    body,
  )
  assert (one.name, one.kind, one.overlapped) == ('f', 'reduce-scatter', 0)
  assert one.seconds / MEGA == pytest.approx(3 / 4 / 2)


def test_a_collective_in_steps_of_fusions(mesh):
  """As v5e has it, and two of them."""

  def body(name, channel, *lines):
    return computation(
      name,
      f'%g = {SHAPE} all-gather(%p), channel_id={channel}, {PIPE}, '
      'backend_config={"async_collective_fusion_config":{"flag_start":"2"}}',
      *lines,
    )

  def end(word):
    return f'ROOT %e = ({SHAPE}, u32[]) custom-call(%g), ' + (
      f'custom_call_target="AsyncCollective{word}"'
    )

  parts = []
  for channel in (1, 2):
    parts += [
      body(f'begin{channel}', channel, end('Start')),
      body(f'step{channel}', channel, *PRODUCT),
      body(f'end{channel}', channel, end('Done')),
    ]

  def call(name, of, calls, extra=''):
    return f'%{name} = ({SHAPE}, u32[]) fusion({of}), calls=%{calls}{extra}'

  found = read(
    mesh,
    [
      call('s1', '%x', 'begin1'),
      call('a', '%s1', 'step1', ', ' + BACKEND % (2 * 1750)),
      f'%x2 = {SHAPE} get-tuple-element(%a), index=0',
      call('s2', '%x2', 'begin2'),
      call('b', '%s2, %a', 'step2', ', ' + BACKEND % (4 * 1750)),
      call('d2', '%b', 'end2'),
      call('d1', '%b', 'end1'),
    ],
    *parts,
  )
  assert [one.name for one in found] == ['s1', 's2']
  # The second needs 1.5 of its 4.
  assert [one.overlapped / MEGA for one in found] == pytest.approx([2 + 2.5, 4])


LOOP = (
  '%condition (p.1: s32[]) -> pred[] {\n'
  '  %p.1 = s32[] parameter(0)\n'
  '  %bound = s32[]{:T(128)} constant(7)\n'
  '  ROOT %lt = pred[] compare(%p.1, %bound), direction=LT\n'
  '}'
)
PERMUTE = f'({SHAPE}, {SHAPE}, u32[]) collective-permute-start(%x), {pairs()}'


def test_loops_and_conditionals(mesh):
  """The costlier branch runs in every trip of the outer and inner loop."""
  heavy = computation(
    'heavy',
    f'%g = {SHAPE} all-gather(%p), {DATA}',
    fusion('work', 3, 'p'),
  )
  light = computation('light', f'ROOT %n = {SHAPE} all-reduce(%p), {PIPE}')
  inner = computation(
    'inner',
    f'ROOT %c = {SHAPE} conditional(%i, %p, %p), '
    'branch_computations={%light, %heavy}',
  )
  outer = computation(
    'outer',
    f'ROOT %w = {SHAPE} while(%p), condition=%condition, body=%inner',
  )
  found = read(
    mesh,
    [
      f'%s = {PERMUTE}',
      f'%w = {SHAPE} while(%x), condition=%condition, body=%outer',
      f'%d = {SHAPE} collective-permute-done(%s)',
    ],
    FUSED,
    LOOP,
    heavy,
    light,
    inner,
    outer,
  )
  permute, gather = found
  assert (permute.name, permute.times) == ('s', 1)
  assert permute.overlapped / MEGA == pytest.approx(49 * 3)
  assert (gather.name, gather.times, gather.overlapped) == ('g', 49, 0)
  assert collectives.exposed_seconds(found) / MEGA == pytest.approx(49 * 3.75)


def test_kernels_cover(mesh):
  """One whose bundles were not counted takes twice its estimate of 2."""
  (one,) = read(
    mesh,
    [
      f'%s = {PERMUTE}',
      f'%k = {SHAPE} custom-call(%x), custom_call_target="tpu_custom_call", '
      'backend_config={"cost_estimate":{"flops":"918000000","bytes_accessed":'
      '"40"}}',
      f'%d = {SHAPE} collective-permute-done(%s)',
    ],
  )
  assert one.overlapped / MEGA == pytest.approx(4)


def two_in_flight(second, *order):
  """A permute of 1 over 'pipe', and a second transfer, around 1.5 and 1."""
  lines = {
    's1': f'%s1 = {PERMUTE}',
    'd1': f'%d1 = {SHAPE} collective-permute-done(%s1)',
    's2': f'%s2 = {second}',
    'd2': f'%d2 = {SHAPE} all-gather-done(%s2)',
    'a': fusion('a', 1.5),
    'b': fusion('b', 1),
  }
  return [lines[name] for name in order]


def test_transfers_over_the_same_links_share_what_covers_them(mesh):
  """The gather needs 1.5 of the ring that the permute needs 1 of."""
  same = f'({SHAPE}, {SHAPE}) all-gather-start(%x), {PIPE}'
  other = f'({SHAPE}, {SHAPE}) all-gather-start(%x), {DATA}'
  for second, order, overlapped in (
    # Awaited first, the permute has all, and leaves 0.5 and 1.
    (same, ('s1', 's2', 'a', 'd1', 'b', 'd2'), (1.5, 0.5 + 1)),
    # The gather takes 1.5, and leaves 1.
    (same, ('s1', 's2', 'a', 'd2', 'b', 'd1'), (0 + 1, 1.5)),
    (same, ('s1', 's2', 'a', 'b', 'd1', 'd2'), (2.5, 1.5)),
    # One after the other.
    (same, ('s1', 'a', 'd1', 's2', 'b', 'd2'), (1.5, 1)),
    # On other links nothing is shared.
    (other, ('s1', 's2', 'a', 'd2', 'b', 'd1'), (2.5, 1.5)),
  ):
    found = read(mesh, two_in_flight(second, *order), FUSED)
    cover = {one.name: one.overlapped / MEGA for one in found}
    assert (cover['s1'], cover['s2']) == pytest.approx(overlapped)


def test_transfers_inside_of_a_loop_come_first(mesh):
  body = computation(
    'body',
    f'%s2 = ({SHAPE}, {SHAPE}) all-to-all-start(%p), {PIPE}',  # 0.5
    fusion('a', 2, 'p'),
    f'ROOT %d2 = {SHAPE} all-to-all-done(%s2)',
  )
  outside, inside = read(
    mesh,
    [
      f'%s1 = {PERMUTE}',
      f'%w = {SHAPE} while(%x), condition=%condition, body=%body',
      f'%d1 = {SHAPE} collective-permute-done(%s1)',
    ],
    FUSED,
    LOOP,
    body,
  )
  assert inside.overlapped / MEGA == pytest.approx(2)
  assert outside.overlapped / MEGA == pytest.approx(7 * (2 - 0.5))


def test_totals_by_axis():
  def one(kind, axes, times, overlapped):
    return collectives.Collective(
      'c', kind, axes, 100.0, times, 3.0, overlapped, frozenset()
    )

  found = [
    one('all-gather', ('data',), 2, 1.0),
    one('all-gather', ('data',), 1, 4.0),
    one('all-reduce', ('data',), 1, 0.0),
    one('all-gather', ('data', 'pipe'), 1, 0.0),
  ]
  assert collectives.by_axis(found) == {
    ('data',): {
      'all-gather': collectives.Total(3, 300.0, 9.0, 4.0),
      'all-reduce': collectives.Total(1, 100.0, 3.0, 3.0),
    },
    ('data', 'pipe'): {'all-gather': collectives.Total(1, 100.0, 3.0, 3.0)},
  }
  assert collectives.exposed_seconds(found) == 4 + 0 + 3 + 3


def test_a_real_schedule():
  """A scan that gathers over 'data' and hands on over 'pipe'."""
  devices = np.array(targets.devices('v5p:2x2x1')).reshape(2, 2)
  mesh = Mesh(devices, ('data', 'pipe'))
  assert collectives.rings(mesh, ('pipe',), V5P) == (ici.Span(0, 2, 1, False),)
  trips, size = 5, 1024

  @jax.jit
  @jax.shard_map(
    mesh=mesh,
    in_specs=(P(('data', 'pipe')), P(None, 'data')),
    out_specs=P(('data', 'pipe')),
  )
  def step(x, weights):
    def body(carry, weight):
      x, sent = carry
      whole = lax.all_gather(weight, 'data', tiled=True)
      received = lax.ppermute(sent, 'pipe', [(0, 1), (1, 0)])
      x = jnp.tanh(jnp.tanh(x @ whole) @ whole)
      return (x + received, x), None

    return lax.scan(body, (x, x), weights)[0][0]

  def abstract(shape, spec):
    return jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )

  compiled = step.lower(
    abstract((4 * size, size), P(('data', 'pipe'))),
    abstract((trips, size, size), P(None, 'data')),
  ).compile()
  module = hlo.parse(compiled.as_text())
  costs = cost.Costs(module, V5P)
  found = collectives.collectives(costs, mesh)
  totals = collectives.by_axis(found)
  matrix = 2 * size * size
  assert totals['data',]['all-gather'][:2] == (trips, trips * matrix / 2)
  handed = totals['pipe',]['collective-permute']
  assert handed[:2] == (trips, trips * matrix)
  # A line of two: half of the matrix, or all of the rows, over one link.
  assert handed.seconds == pytest.approx(trips * matrix / V5P.ici_bandwidth)
  gathered = totals['data',]['all-gather']
  assert gathered.seconds == pytest.approx(
    trips * matrix / 2 / V5P.ici_bandwidth
  )
  # By default TPU compilers hide permutes, and no gather on a v5p.
  assert gathered.exposed == gathered.seconds
  assert handed.exposed < 0.9 * handed.seconds
  (permute,) = (one for one in found if one.kind == 'collective-permute')
  compute = costs.entry.middle
  assert 0 < permute.overlapped < compute / trips
  assert collectives.step_seconds(costs, mesh) == pytest.approx(
    compute + gathered.exposed + handed.exposed
  )
