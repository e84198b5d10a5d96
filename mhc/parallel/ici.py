r"""Time of transfers between devices over the ICI links of their torus.

Chips lie on a grid of 2 or 3 dimensions. Each has a link either way to its
neighbours, of L bytes a second. A dimension closes to a ring where the slice is
made of whole cubes (3 dimensions, all multiples of 4) or is 16 long (2
dimensions); else it is a line. Two devices of one chip share its links, and
need none to each other. Latency is neglected.

An all-gather to B bytes on each of g chips, or a reduce-scatter of as many, its
reverse, uses all dimensions that they span at once:

    seconds = B (g-1)/g / sum_d L w_d / s_d

w_d = 2 on a ring, both of whose directions carry, and 1 on a line, whose end
has one link. s_d is the distance of neighbours in the group: s_d groups
interleave, and share the links.

A message from one device to another takes the shortest path, dimension by
dimension, and

    seconds = max over links of the bytes of all messages across it / L

so a shift by h along a ring, B bytes from each device, takes B h / L, and an
all-to-all, in which each device sends B bytes in g equal parts,

    ring, g even:  B g / (8 L)    a byte goes g/4 far in the mean, and a chip
                                  has two links to send by
    line, g even:  B g / (4 L)    half of the bytes of half of the chips,
                                  g/2 B/2, cross the link in the middle

on its longest dimension.
"""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Int
import numpy as np

from mhc.kernels import chips

# A dimension of the torus, and the way along it: 0 forward, 1 backward.
Link = tuple[int, int]
Groups = Int[np.ndarray, 'groups members']  # device numbers in the mesh
Pairs = Int[np.ndarray, 'pairs 2']
CUBE = 4
RING = 16


class Torus(NamedTuple):
  """The devices of a mesh on their torus.

  Attributes:
    coords: [devices, dimensions], of each device's chip, in the mesh's order.
    slice_shape: the slice's dimensions in chips.
    rings: which dimensions close.
    devices_per_chip: two where each core of a chip is a device.
    speed: L, bytes a second of a link.
  """

  coords: np.ndarray
  slice_shape: tuple[int, ...]
  rings: tuple[bool, ...]
  devices_per_chip: int
  speed: float


class Span(NamedTuple):
  """Extent of a group in a dimension: `size` chips, `stride` apart."""

  dimension: int
  size: int
  stride: int
  ring: bool


class LinkUse(NamedTuple):
  """Seconds for which the busiest link is in use, and all links in use."""

  seconds: float
  links: frozenset[Link]


def make_torus(
  coords: Int[np.ndarray, 'devices dimensions'], chip: chips.Chip
) -> Torus:
  """The smallest slice with chips at these coordinates, one per device."""
  coords = coords - coords.min(axis=0)
  slice_shape = tuple(int(extent) + 1 for extent in coords.max(axis=0))
  if chip.ici_links == 6:
    rings = (all(extent % CUBE == 0 for extent in slice_shape),) * len(
      slice_shape
    )
  else:
    rings = tuple(extent == RING for extent in slice_shape)
  devices_per_chip = int(np.unique(coords, axis=0, return_counts=True)[1].max())
  return Torus(coords, slice_shape, rings, devices_per_chip, chip.ici_bandwidth)


def spans(
  torus: Torus, group: Int[np.ndarray, ' members']
) -> tuple[Span, ...] | None:
  """The dimensions in which a group extends; None if it is not an even grid."""
  coords = np.unique(torus.coords[group], axis=0)
  found, number = [], 1
  for dimension, extent in enumerate(torus.slice_shape):
    values = np.unique(coords[:, dimension])
    number *= len(values)
    if len(values) == 1:
      continue
    ring = torus.rings[dimension]
    gaps = np.diff(values, append=values[0] + extent).tolist()
    if not ring or len(set(gaps)) > 1:  # a line, which may cross the seam
      ring = False
      gaps.pop(gaps.index(max(gaps)) if torus.rings[dimension] else -1)
    if len(set(gaps)) > 1:
      return None
    found.append(Span(dimension, len(values), gaps[0], ring))
  return tuple(found) if number == len(coords) else None


def links(spans: Iterable[Span]) -> float:
  """sum_d w_d / s_d, as many links as a group gathers over."""
  return sum(((2 if s.ring else 1) / s.stride for s in spans), 0.0)


def all_gather(torus: Torus, groups: Groups, size: float) -> LinkUse:
  """Gathers `size` bytes to every device of each group; the groups are alike.

  A group that is not a grid passes them on from each device to the next.
  """
  group = groups[0]
  found = spans(torus, group)
  if found is None:
    following = np.roll(groups, -1, axis=1)
    pairs = np.stack([groups.ravel(), following.ravel()], axis=1)
    use = permute(torus, pairs, size / len(group))
    return use._replace(seconds=(len(group) - 1) * use.seconds)
  if not found:
    return LinkUse(0.0, frozenset())
  number = np.prod([span.size for span in found])
  others = (
    torus.devices_per_chip * number / len(group)
  )  # groups on the same chips
  speed = links(found) * torus.speed
  seconds = others * size * (1 - 1 / number) / speed
  used = {(span.dimension, way) for span in found for way in (0, 1)}
  return LinkUse(float(seconds), frozenset(used))


def all_to_all(torus: Torus, groups: Groups, size: float) -> LinkUse:
  """Sends `size` bytes from each device, an equal part to each of its group."""
  number = groups.shape[1]
  sources = np.repeat(groups, number, axis=1).ravel()
  targets = np.tile(groups, (1, number)).ravel()
  # At equal distance both ways, half goes either way.
  return _use(
    torus,
    _loads(torus, sources, targets, size / number / 2, 0)
    + _loads(torus, sources, targets, size / number / 2, 1),
  )


def permute(torus: Torus, pairs: Pairs, size: float) -> LinkUse:
  """Sends `size` bytes from the first to the second device of every pair."""
  sources, targets = pairs.T
  return _use(torus, _loads(torus, sources, targets, size, 0))


def _use(torus, loads):
  busy = loads.max(axis=-1)
  links = {(int(d), int(way)) for d, way in np.argwhere(busy)}
  return LinkUse(float(busy.max()) / torus.speed, frozenset(links))


def _loads(torus, sources, targets, size, way_if_equal):
  """Bytes over the outgoing links of each chip, [dimensions, ways, chips]."""
  loads = np.zeros((len(torus.slice_shape), 2, *torus.slice_shape))
  here, ends = torus.coords[sources], torus.coords[targets]
  for dimension, extent in enumerate(torus.slice_shape):
    distance = ends[:, dimension] - here[:, dimension]
    if torus.rings[dimension]:
      distance = distance % extent
      back = 2 * distance + way_if_equal > extent
      distance = np.where(back, distance - extent, distance)
    for step in range(int(np.abs(distance).max(initial=0))):
      at = here.copy()
      at[:, dimension] = (at[:, dimension] + step * np.sign(distance)) % extent
      for way, moves in enumerate((distance > step, -distance > step)):
        np.add.at(loads[dimension, way], tuple(at[moves].T), size)
    here[:, dimension] = ends[:, dimension]
  return loads.reshape(len(torus.slice_shape), 2, -1)
