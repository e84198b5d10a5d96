"""Where the axes of a mesh lie on the torus of a TPU slice.

An axis of g devices has a factor g_d in each dimension d of the torus, their
product being g. Within a dimension the axes are nested, those further in with
the smaller strides. An axis gathers over

    links = sum_d w_d / s_d

(`ici`), so that it is faster over several dimensions than along one, and
beside each other than apart. Of all places the one is taken that has the least

    1 / links(data) + AT_ONCE / links(expert) + HANDED_ON * stride(pipe):

a step of a large model moves about as many bytes along `data`, its matrices and
gradients, as along `expert`, its tokens, but waits for these in every layer.
States between stages are handed on while something is computed. The cores of a
chip are a dimension of their own, which needs no link.
"""

from collections.abc import Iterator
import itertools
import math

from jaxtyping import Int
import numpy as np

from mhc.parallel import ici

AT_ONCE = 2.0
HANDED_ON = 0.01
DATA, PIPE, EXPERT = range(3)

# The sizes of the axes in one dimension of the torus, and from the outermost to
# the innermost of those above 1.
Part = tuple[tuple[int, ...], tuple[int, ...]]


def place(
  shape: tuple[int, int, int], torus: ici.Torus
) -> Int[np.ndarray, 'data pipe expert'] | None:
  """The numbers of the devices of a mesh; None if they are no whole grid."""
  extents = (*torus.slice_shape, torus.devices_per_chip)
  if math.prod(extents) != len(torus.coords):
    return None
  found = min(_places(shape, extents), key=lambda parts: _cost(parts, torus))
  return _numbers(found, torus)


def _places(shape, extents) -> Iterator[tuple[Part, ...]]:
  for sizes in _sizes(shape, extents):
    orders = [
      itertools.permutations([a for a in (DATA, PIPE, EXPERT) if own[a] > 1])
      for own in sizes
    ]
    for order in itertools.product(*orders):
      yield tuple(zip(sizes, order, strict=True))


def _sizes(shape, extents):
  """The sizes of the axes in each dimension."""
  if not extents:
    if math.prod(shape) == 1:
      yield ()
    return
  divisors = [[f for f in range(1, n + 1) if n % f == 0] for n in shape]
  for own in itertools.product(*divisors):
    if math.prod(own) == extents[0]:
      rest = tuple(n // f for n, f in zip(shape, own, strict=True))
      yield from ((own, *more) for more in _sizes(rest, extents[1:]))


def _cost(parts, torus):
  spans: tuple[list, ...] = ([], [], [])
  for dimension, (own, order) in enumerate(parts[:-1]):
    stride = 1
    for axis in reversed(order):
      around = own[axis] * stride == torus.slice_shape[dimension]
      ring = torus.rings[dimension] and around
      spans[axis].append(ici.Span(dimension, own[axis], stride, ring))
      stride *= own[axis]
  cores = parts[-1][0]
  seconds = HANDED_ON * max((span.stride for span in spans[PIPE]), default=0)
  for axis, weight in ((DATA, 1.0), (EXPERT, AT_ONCE)):
    if spans[axis]:
      others = torus.devices_per_chip / cores[axis]  # groups on the same chips
      seconds += weight * others / ici.links(spans[axis])
  return seconds


def _numbers(parts, torus):
  """The device at each place of the mesh."""
  extents = (*torus.slice_shape, torus.devices_per_chip)
  grid = np.lexsort(torus.coords.T[::-1]).reshape(extents)
  labels = [axis for _, order in parts for axis in order]
  nested = grid.reshape([own[axis] for own, order in parts for axis in order])
  by_axis = sorted(range(len(labels)), key=lambda place: labels[place])
  shape = [math.prod(own[axis] for own, _ in parts) for axis in range(3)]
  return nested.transpose(by_axis).reshape(shape)
