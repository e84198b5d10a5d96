"""The axes of a mesh on the torus of a TPU slice."""

import itertools
import math
from types import SimpleNamespace

from jax.experimental import mesh_utils
import numpy as np
import pytest

from mhc.kernels import chips
from mhc.parallel import ici
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import torus


def slice_of(generation, extents, cores=1):
  """The torus of a whole slice, its chips in a random order."""
  coords = np.array([*np.ndindex(*extents)] * cores)
  np.random.default_rng(0).shuffle(coords)
  return ici.make_torus(coords, chips.CHIPS[generation])


def groups(placed, axis):
  return np.moveaxis(placed, axis, -1).reshape(-1, placed.shape[axis])


def seconds(at, placed, axis):
  """To gather a byte along an axis."""
  return ici.all_gather(at, groups(placed, axis), 1.0).seconds


SLICES = [
  *(
    ('v5p', (8, 8, 8), shape) for shape in ((64, 2, 4), (16, 4, 8), (512, 1, 1))
  ),
  *(
    ('v5p', (4, 4, 8), shape) for shape in ((8, 4, 4), (2, 64, 1), (1, 1, 128))
  ),
  *(('v6e', (16, 16), shape) for shape in ((16, 4, 4), (32, 1, 8))),
  ('v6e', (4, 8), (4, 2, 4)),
  ('v5e', (2, 2), (2, 1, 2)),
  ('v5p', (12, 4, 4), (24, 2, 4)),
]


@pytest.mark.parametrize(('generation', 'extents', 'shape'), SLICES)
def test_groups_are_even_grids_of_all_devices(generation, extents, shape):
  at = slice_of(generation, extents)
  placed = torus.place(shape, at)
  assert placed.shape == shape
  assert sorted(placed.flat) == [*range(math.prod(extents))]
  for axis in range(3):
    alike = {ici.spans(at, group) for group in groups(placed, axis)}
    # A group may cross the seam of a ring, which is the same time.
    assert None not in alike
    assert len({ici.links(found) for found in alike}) == 1


def test_experts_of_the_paper_lie_over_two_dimensions():
  at = slice_of('v5p', (8, 8, 8))
  placed = torus.place((64, 2, 4), at)
  spans = ici.spans(at, groups(placed, torus.EXPERT)[0])
  assert [(span.size, span.stride) for span in spans] == [(2, 1), (2, 1)]
  in_a_line = at.coords.tolist()
  line = np.array([in_a_line.index([x, 0, 0]) for x in range(4)])
  alone = ici.all_gather(at, line[None], 1.0).seconds
  assert seconds(at, placed, torus.EXPERT) == pytest.approx(alone / 2)


def costs(at, placed):
  """What is least of all places, by the groups themselves."""
  data, expert = (
    seconds(at, placed, axis) for axis in (torus.DATA, torus.EXPERT)
  )
  size = placed.shape
  data /= 1 - 1 / size[0] if size[0] > 1 else 1
  expert /= 1 - 1 / size[2] if size[2] > 1 else 1
  return (data + torus.AT_ONCE * expert) * at.speed


def test_no_order_of_whole_dimensions_is_better():
  at = slice_of('v5p', (4, 8, 8))
  for shape in ((32, 2, 4), (8, 8, 4), (4, 2, 32), (16, 1, 16)):
    best = costs(at, torus.place(shape, at))
    found = []
    for dimensions in itertools.permutations(range(3)):
      order = np.lexsort(at.coords[:, dimensions].T)
      for axes in itertools.permutations(range(3)):
        nested = order.reshape([shape[axis] for axis in axes])
        found.append(costs(at, nested.transpose(np.argsort(axes))))
    assert best <= min(found) + torus.HANDED_ON


def test_cores_of_a_chip_are_beside_each_other():
  at = slice_of('tpu7x', (4, 4, 4), cores=2)
  placed = torus.place((8, 2, 8), at)
  assert sorted(placed.flat) == [*range(128)]
  chips_of = np.unique(at.coords[groups(placed, torus.EXPERT)[0]], axis=0)
  assert len(chips_of) == 4


def test_a_slice_with_holes_is_left_to_jax(monkeypatch):
  coords = np.array([*np.ndindex(2, 2, 2)])[:6]
  at = ici.make_torus(coords, chips.CHIPS['v5p'])
  assert torus.place((3, 1, 2), at) is None
  devices = [
    SimpleNamespace(device_kind='TPU v5', coords=[*place]) for place in coords
  ]
  asked = []
  monkeypatch.setattr(
    mesh_utils, 'create_device_mesh', lambda *args, **_: asked.append(args)
  )
  mesh_lib._on_torus((3, 1, 2), devices)
  assert asked == [((3, 1, 2), devices)]
