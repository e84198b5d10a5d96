"""Pipeline schedules: orders, tables, what validation catches, the picture."""

import dataclasses
import functools
import itertools
import types
from typing import get_args

import numpy as np
import pytest

from mhc.pipeline import bubble
from mhc.pipeline import draw
from mhc.pipeline import schedules
from mhc.pipeline import table as table_lib
from mhc.pipeline import transfers

NAMES = get_args(table_lib.Name)
HEADS = get_args(table_lib.Head)
FORWARD = (
  ('linear', 1),
  ('loop', 1),
  ('loop', 2),
  ('loop', 3),
  ('vshape', 2),
)


def every(name, devices=(1, 2, 3, 4, 8), microbatches=(1, 2, 3, 4, 5, 8, 17)):
  """Schedules of many sizes."""
  chunks = (2, 3) if name == 'interleaved' else (2,)
  for head, p, v in itertools.product(HEADS, devices, chunks):
    fewest = table_lib.minimum_microbatches(name, p)
    for m in sorted({max(m, fewest) for m in microbatches}):
      yield table_lib.build(name, p, m, num_chunks=v, head=head)


@pytest.mark.parametrize(
  ('p', 'm', 'name', 'ticks', 'slots', 'grads', 'lockstep', 'none'),
  [
    (4, 16, 'gpipe', 37, 16, 1, 0.147, 0.111),
    (4, 16, '1f1b', 22, 5, 1, 0.135, 0.123),
    (4, 16, 'interleaved', 42, 9, 1, 0.072, 0.066),
    (4, 16, 'wave_v', 46, 9, 1, 0.152, 0.111),
    (4, 16, 'dualpipev', 46, 10, 2, 0.163, 0.111),
    (8, 32, '1f1b', 46, 13, 1, 0.169, 0.163),
    (8, 32, 'interleaved', 86, 21, 1, 0.092, 0.089),
    (8, 32, 'dualpipev', 94, 18, 2, 0.182, 0.135),
    (4, 64, '1f1b', 70, 5, 1, 0.038, 0.034),
    (4, 64, 'interleaved', 138, 9, 1, 0.019, 0.017),
    (4, 64, 'dualpipev', 142, 10, 2, 0.047, 0.030),
  ],
)
def test_sizes_and_bubbles(p, m, name, ticks, slots, grads, lockstep, none):
  """A forward pass costs 1, a backward pass with recomputation 3."""
  built = table_lib.build(name, p, m)
  assert built.num_ticks == ticks
  assert (built.num_slots, built.num_grad_slots) == (slots, grads)
  assert table_lib.peak_states(built) == slots + grads
  assert round(bubble.fraction(built), 3) == lockstep
  assert round(bubble.fraction(built, sync='none'), 3) == none


@pytest.mark.parametrize(
  ('name', 'p', 'm', 'expected'),
  [
    ('dualpipev', 4, 16, 0.147),
    ('dualpipev', 8, 32, 0.174),
    ('1f1b', 4, 16, 0.135),
    ('interleaved', 4, 16, 0.072),
  ],
)
def test_bubble_with_neighbours_alone(name, p, m, expected):
  built = table_lib.build(name, p, m)
  assert round(bubble.fraction(built, sync='neighbour'), 3) == expected


@pytest.mark.parametrize('name', NAMES)
def test_waiting_for_fewer_devices_is_never_slower(name):
  for built in every(name):
    none, neighbour, lockstep = (
      bubble.fraction(built, sync=sync)
      for sync in ('none', 'neighbour', 'lockstep')
    )
    assert -1e-12 <= none <= neighbour + 1e-12
    assert neighbour <= lockstep + 1e-12 < 1


@pytest.mark.parametrize('p', [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
  ('name', 'slots', 'grads'),
  [
    ('gpipe', lambda p, m: m, 1),
    ('1f1b', lambda p, m: 2 * p - 3, 1),
    ('interleaved', lambda p, m: 3 * p - 3, 1),
    ('wave_v', lambda p, m: 2 * p + 1, 1),
    ('dualpipev', lambda p, m: 2 * p + 2, 2),
  ],
)
def test_closed_forms_of_memory(name, slots, grads, p):
  """No schedule but gpipe needs more for more microbatches."""
  fewest = table_lib.minimum_microbatches(name, p)
  for m in (1, 2, p, 2 * p, 3 * p, 4 * p + 1, 7 * p):
    if m < fewest:
      continue
    built = table_lib.build(name, p, m)
    form = slots(p, m)
    assert built.num_slots <= form
    assert built.num_grad_slots <= grads
    if m >= 3 * p:
      assert (built.num_slots, built.num_grad_slots) == (form, grads)


@pytest.mark.parametrize('v', [2, 3, 4])
def test_memory_of_more_chunks(v):
  for p in (2, 3, 4):
    built = table_lib.build('interleaved', p, 8 * p, num_chunks=v)
    assert built.num_slots == (v + 1) * p - 3
    assert built.num_grad_slots == 1


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', NAMES)
def test_more_microbatches_never_take_fewer_ticks(name, head):
  for p in (1, 2, 3, 4, 8):
    fewest = table_lib.minimum_microbatches(name, p)
    ticks = [
      table_lib.build(name, p, m, head=head).num_ticks
      for m in range(fewest, fewest + 20)
    ]
    assert ticks == sorted(ticks)


def test_formulas():
  shape = schedules.Shape(4, 1, 6)
  s, m = np.arange(4)[:, None], np.arange(6)[None]
  for order, f, b in (
    (schedules.gpipe, m + s, 8 + m + 3 - s),
    (schedules.one_f_one_b, m + s, m + 6 - s),
  ):
    np.testing.assert_array_equal(order(shape), [f, b])
  s = np.arange(8)[:, None]
  wave = schedules.wave_v(schedules.Shape(4, 2, 6))
  np.testing.assert_array_equal(wave, [2 * m + s, 2 * m + 15 - s])
  f, b = schedules.one_f_one_b(schedules.Shape(4, 1, 6, last_forward=False))
  assert (f[-1] == -1).all()
  assert b[-1, 0] == 3


def test_dualpipev_does_each_device_s_operations_in_their_order():
  """Two devices, four microbatches; capitals are the way back of the V."""
  built = table_lib.build('dualpipev', 2, 4, head='vocab')
  does = ['', '']
  for tick, (device, kind) in itertools.product(
    range(built.num_ticks), itertools.product((0, 1), 'fb')
  ):
    chunk = built.table[f'{kind}_chunk'][tick, device]
    if chunk >= 0:
      does[device] += kind.upper() if chunk else kind
  assert does[0] == 'fffFBFfBFbBFbBbb'
  assert does[1] == 'fFfFfBFbfBFbBbBb'


def play(built):
  """An executor on scalars: y = sin(w x), the loss the sum of y^2 / 2.

  Empty slots and what an idle device sends are NaN. Returns the gradients of
  every w and of every microbatch's embedding.
  """
  p, stages = built.num_devices, built.num_devices * built.num_chunks
  rng = np.random.default_rng(0)
  weights = rng.uniform(0.5, 1.5, stages)
  x = rng.normal(size=built.num_microbatches)
  acts = np.full((p, built.num_slots), np.nan)
  grads = np.full((p, built.num_grad_slots), np.nan)
  heads = np.full(built.num_head_slots, np.nan)
  of = functools.partial(table_lib.stage_of, built.placement, p)
  last = next(d for d in range(p) if of(d, built.num_chunks - 1) == stages - 1)
  d_weights, d_x, outputs = np.zeros(stages), np.zeros_like(x), {}
  sent = np.full(p, np.nan)

  def receive(buffer, what, values, row):
    for shift, side in transfers.SIDES.items():
      is_open = shift == 0 or (what, shift) in built.channels
      came = np.roll(values, shift) if is_open else np.full(p, np.nan)
      slots = row[f'recv_{what}_{side}']
      there = slots >= 0
      buffer[there, slots[there]] = came[there]

  for tick in range(built.num_ticks):
    row = {column: array[tick] for column, array in built.table.items()}
    receive(grads, 'grad', sent, row)
    y, sent = np.full(p, np.nan), np.full(p, np.nan)
    for d in np.flatnonzero(row['f_chunk'] >= 0).tolist():
      stage, m = of(d, int(row['f_chunk'][d])), int(row['f_mb'][d])
      into = x[m] if row['f_first'][d] else acts[d, row['f_slot'][d]]
      y[d] = np.sin(weights[stage] * into)
      if row['f_last'][d]:
        outputs[m] = y[d]
    if row['head_mb'] >= 0:
      assert outputs[int(row['head_mb'])] == y[last]
      heads[row['head_slot']] = y[last]
    for d in np.flatnonzero(row['b_chunk'] >= 0).tolist():
      stage, m = of(d, int(row['b_chunk'][d])), int(row['b_mb'][d])
      into = x[m] if row['b_first'][d] else acts[d, row['b_slot'][d]]
      if not row['b_last'][d]:
        dy = grads[d, row['b_grad_slot'][d]]
      elif built.head == 'vocab':
        dy = heads[row['b_head_slot'][d]]
      else:
        dy = np.sin(weights[stage] * into)
      d_product = dy * np.cos(weights[stage] * into)
      d_weights[stage] += d_product * into
      sent[d] = d_product * weights[stage]
      if row['b_first'][d]:
        d_x[m] += sent[d]
    receive(acts, 'act', y, row)
  return weights, x, d_weights, d_x, outputs


def plain(weights, x):
  """The same without a pipeline."""
  inputs = [x]
  for w in weights:
    inputs.append(np.sin(w * inputs[-1]))
  dy, d_weights = inputs[-1], []
  for w, into in zip(weights[::-1], inputs[-2::-1], strict=True):
    d_product = dy * np.cos(w * into)
    d_weights.append((d_product * into).sum())
    dy = d_product * w
  return inputs[-1], d_weights[::-1], dy


@pytest.mark.parametrize('name', NAMES)
def test_tables_compute_the_gradient(name):
  for built in every(name):
    table_lib.validate(built)
    weights, x, d_weights, d_x, _ = play(built)
    _, expected_weights, expected_x = plain(weights, x)
    np.testing.assert_allclose(d_weights, expected_weights, rtol=1e-12)
    np.testing.assert_allclose(d_x, expected_x, rtol=1e-12)


@pytest.mark.parametrize(('placement', 'v'), FORWARD)
def test_tables_compute_the_forward_pass(placement, v):
  for p, m in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 5, 8, 17)):
    built = table_lib.build_forward(placement, p, v, m)
    table_lib.validate(built)
    assert built.name == 'forward'
    weights, x, _, _, outputs = play(built)
    expected, _, _ = plain(weights, x)
    np.testing.assert_allclose([outputs[i] for i in range(m)], expected)
    assert (built.table['b_chunk'] == -1).all()
    if placement == 'vshape':
      assert built.num_ticks == 2 * (m + p - 1)
    elif m >= p:
      assert built.num_ticks == v * m + p - 1
    assert all(what == 'act' for what, _ in built.channels)
    assert built.num_slots <= min(m, p)


@pytest.mark.parametrize('name', NAMES)
def test_head_of_the_vocabulary(name):
  """Once a microbatch, with the last F; its gradient does not lie around."""
  for p in (1, 2, 4, 8):
    built = table_lib.build(name, p, 16, head='vocab')
    table = built.table
    has_head = table['head_mb'] >= 0
    last_f = table['f_last'] == 1
    np.testing.assert_array_equal(has_head, last_f.any(axis=1))
    np.testing.assert_array_equal(table['head_mb'][has_head], np.arange(16))
    assert built.num_head_slots == (16 if name == 'gpipe' else 1)
    plain_head = table_lib.build(name, p, 16)
    assert plain_head.num_head_slots == 0
    assert plain_head.table['f_last'].sum() == 0
    assert built.num_slots <= plain_head.num_slots + (p == 1)


def test_one_device_accumulates_gradients():
  for name in ('gpipe', '1f1b'):
    built = table_lib.build(name, 1, 5)
    assert (built.num_ticks, built.num_slots) == (5, 0)
  for name in NAMES:
    built = table_lib.build(name, 1, 5)
    assert built.channels == ()
    sides = [
      built.table[f'recv_{what}_{side}']
      for what in ('act', 'grad')
      for side in ('left', 'right')
    ]
    assert (np.stack(sides) == -1).all()


def test_channels():
  one_way = (('act', 1), ('grad', -1))
  both_ways = (('act', 1), ('act', -1), ('grad', 1), ('grad', -1))
  for name in NAMES:
    is_v = name in ('wave_v', 'dualpipev')
    for p in (2, 4):
      assert table_lib.build(name, p, 8).channels == (
        both_ways if is_v else one_way
      )


def test_schedules_are_values():
  one = table_lib.build('interleaved', 4, 8)
  assert one is table_lib.build('interleaved', 4, 8)
  others = [
    table_lib.build('interleaved', 4, 9),
    table_lib.build('interleaved', 4, 8, num_chunks=3),
    table_lib.build('interleaved', 4, 8, head='vocab'),
    table_lib.build_forward('loop', 4, 2, 8),
    table_lib.build_forward('vshape', 4, 2, 8),
  ]
  assert len({one, *others}) == 6
  fixed = table_lib.build('1f1b', 4, 8)
  assert fixed == table_lib.build('1f1b', 4, 8, num_chunks=3)
  assert hash(fixed) == hash(table_lib.build('1f1b', 4, 8, num_chunks=3))
  assert all(array.dtype == np.int32 for array in one.table.values())
  with pytest.raises(ValueError, match='read-only'):
    one.table['f_mb'][0, 0] = 3


def test_stages_lie_where_they_should():
  for placement, order in (
    ('linear', [0, 1, 2]),
    ('loop', [0, 1, 2, 0, 1, 2]),
    ('vshape', [0, 1, 2, 2, 1, 0]),
  ):
    where = transfers.places(placement, 3, len(order) // 3)
    assert [device for device, _ in where] == order
    for stage, (device, chunk) in enumerate(where):
      assert table_lib.stage_of(placement, 3, device, chunk) == stage


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (
      ('dualpipev', 4, 4),
      'schedule dualpipev needs at least 2P = 8 microbatches on 4 devices, '
      'got 4',
    ),
    (('zero', 4, 4), 'schedule must be one of gpipe, .*dualpipev, got .zero.'),
    (('1f1b', 4, 0), 'a pipeline needs 1 or more microbatches, got 0'),
    (('1f1b', 0, 4), 'a pipeline needs 1 or more devices, got 0'),
  ],
)
def test_impossible_schedules(arguments, message):
  with pytest.raises(ValueError, match=message):
    table_lib.build(*arguments)


def test_impossible_settings():
  with pytest.raises(ValueError, match='at least 2 stages a device, got 1'):
    table_lib.build('interleaved', 4, 4, num_chunks=1)
  with pytest.raises(ValueError, match="'last' or 'vocab', got 'first'"):
    table_lib.build('1f1b', 4, 4, head='first')
  with pytest.raises(ValueError, match='vshape has 2 stages a device, got 3'):
    table_lib.build_forward('vshape', 4, 3, 4)
  with pytest.raises(ValueError, match='loop has 1 stages a device, got 0'):
    table_lib.build_forward('loop', 4, 0, 4)
  assert table_lib.minimum_microbatches('dualpipev', 8) == 16
  assert table_lib.minimum_microbatches('interleaved', 8) == 1


def damaged(built, *changes, **fields):
  """The schedule with other entries: (column, tick and device, value)."""
  table = {column: array.copy() for column, array in built.table.items()}
  for column, at, value in changes:
    table[column][at] = value
  table = types.MappingProxyType(table)
  return dataclasses.replace(built, **fields, table=table)


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('name', NAMES)
def test_validation_notices_every_entry(name, head):
  built = table_lib.build(name, 2, 4, head=head)
  table_lib.validate(damaged(built))
  for column, array in built.table.items():
    for at in np.ndindex(*array.shape):
      other = damaged(built, (column, at, array[at] + 1))
      with pytest.raises(AssertionError):
        table_lib.validate(other)


def test_validation_says_what_is_wrong():
  """1f1b on four devices: F(1, 0) is in tick 1, B(3, 0) in 3, B(0, 0) in 6."""
  built = table_lib.build('1f1b', 4, 8)
  slot = int(built.table['f_slot'][2, 1])
  other = (slot + 1) % built.num_slots
  # Stage 1 keeps the inputs of microbatches 0 and 1 at once.
  first = int(built.table['f_slot'][1, 1])
  entries = (('recv_act_right', (1, 1)), ('f_slot', (2, 1)), ('b_slot', (6, 1)))
  for changes, message in (
    ([('b_chunk', (6, 0), -1)], 'B of stage 0, microbatch 0, is in no tick'),
    (
      [('f_mb', (2, 1), 0)],
      'tick 2, device 1: F of stage 1, microbatch 0 was done in tick 1',
    ),
    (
      [('f_chunk', (0, 1), 0), ('f_mb', (0, 1), 0), ('f_chunk', (1, 1), -1)],
      'tick 0: F of stage 1, microbatch 0, needs what is done in tick 0',
    ),
    (
      [('f_chunk', (3, 3), 0), ('f_mb', (3, 3), 0)],
      'tick 3: F of stage 3, microbatch 0, has no place there',
    ),
    ([('f_chunk', (0, 0), 1)], 'tick 0, device 0: F of chunk 1 of 1'),
    ([('f_mb', (0, 0), 8)], 'tick 0, device 0: F of microbatch 8 of 8'),
    (
      [('recv_act_right', (1, 1), other)],
      f'tick 1: act for stage 1, microbatch 1: is stored in slot {other}, but '
      f'f_slot of tick 2 is {slot}',
    ),
    (
      [('b_slot', (6, 1), other)],
      f'tick 1: act for stage 1, microbatch 1: is stored in slot {slot}, but '
      f'b_slot of tick 6 is {other}',
    ),
    (
      [(*entry, first) for entry in entries],
      'tick 1: act for stage 1, microbatch 1: overwrites slot '
      f'{first}, which is read until tick 5',
    ),
    (
      [('recv_grad_left', (4, 2), -1)],
      'tick 4: grad for stage 2, microbatch 0: '
      'recv_grad_left is -1, of 1 slots',
    ),
    (
      [('recv_act_left', (3, 2), 0)],
      'tick 3, device 2: recv_act_left is 0, must be -1',
    ),
    ([('f_first', (0, 0), 0)], 'f_first is 0, must be 1'),
  ):
    with pytest.raises(AssertionError, match=message):
      table_lib.validate(damaged(built, *changes))


def test_validation_of_sizes():
  built = table_lib.build('dualpipev', 4, 8, head='vocab')
  for fields, message in (
    ({'num_slots': built.num_slots - 1}, f'of {built.num_slots - 1} slots'),
    ({'num_grad_slots': 0}, 'grad for stage .* of 0 slots'),
    ({'num_head_slots': 0}, 'head for stage 7.* of 0 slots'),
    ({'num_ticks': built.num_ticks + 1}, 'ticks are miscounted'),
    ({'channels': built.channels[1:]}, 'channels in use'),
  ):
    with pytest.raises(AssertionError, match=message):
      table_lib.validate(damaged(built, **fields))
  fewer = {k: v for k, v in built.table.items() if k != 'recv_act_self'}
  with pytest.raises((AssertionError, KeyError), match='recv_act_self'):
    table_lib.validate(dataclasses.replace(built, table=fewer))


@pytest.mark.parametrize('name', NAMES)
def test_timeline(name, tmp_path):
  built = table_lib.build(name, 4, 8)
  figure = draw.draw(built)
  (axis,) = figure.axes
  title = axis.get_title()
  assert title.startswith(f'{name}: P = 4, M = 8, bubble ')
  assert title.endswith(f'{bubble.fraction(built):.1%}')
  stages = 4 * built.num_chunks
  # F of all stages but one and B of all; embedding at F and B, head at B.
  assert len(axis.patches) == 8 * (2 * stages - 1 + 2 + 1)
  numbers = [text.get_text() for text in axis.texts]
  assert sorted(numbers) == sorted([*map(str, range(8))] * (2 * stages - 1))
  draw.save(built, tmp_path / 'timeline.png')
  assert (tmp_path / 'timeline.png').read_bytes().startswith(b'\x89PNG')


def test_timeline_without_room_has_no_numbers():
  figure = draw.draw(table_lib.build('1f1b', 2, 300))
  texts = {text.get_text() for text in figure.axes[0].texts}
  assert not texts
  figure = draw.draw(table_lib.build_forward('loop', 2, 2, 4))
  assert len(figure.axes[0].patches) == 4 * 4 + 4 + 4
