r"""Collectives of a compiled TPU step and their cost, from its scheduled HLO.

For a group of g devices with an operand of B bytes each: the most that one
sends or receives, and the transfer that `ici` times:

    all-gather            B (g-1)       gathers g B
    reduce-scatter        B (g-1)/g     the reverse: gathers B
    all-reduce            2 B (g-1)/g   both of these: gathers 2 B
    all-to-all            B (g-1)/g     exchanges B
    ragged-all-to-all     B (g-1)/g     as if its parts were equal; B is the
                                        smaller of operand and result, one of
                                        which has spare capacity
    collective-permute    B             sends B

A transfer that the compiler split into a start, which has its operand, and a
done is overlapped by what is scheduled between them in the same computation,
loops, conditionals and kernels in full:

    exposed = sum of times * max(0, seconds - overlapped)

A second of compute overlaps one second of a link (a dimension and a direction).
Of transfers in flight over the same link, the one awaited first takes what it
needs from the earliest instructions on, the others the remainder. Transfers
inside a loop or a conditional precede those around it.

Starts and dones are `x-start` and `x-done`; of a collective on the SparseCores,
which `call-start` wakes, the `call-update` that hands it the operand, and
`call-done`; and fusions of AsyncCollectiveStart and AsyncCollectiveDone, with
the collective's steps in those between (v5e).
"""

from collections.abc import Iterable, Sequence
import functools
import math
import re
from typing import NamedTuple

from jax.sharding import Mesh
import numpy as np

from mhc.kernels import chips
from mhc.parallel import ici
from mhc.planner import cost
from mhc.planner import hlo


class Collective(NamedTuple):
  """An instruction that communicates.

  Attributes:
    name: of the instruction, or of the one that starts it.
    kind: one of hlo.COLLECTIVES.
    axes: of the mesh, along which its groups extend.
    bytes: sent or received by a device, once.
    times: executions per step: the trips of the loops around it. Of a
      conditional only the most expensive branch counts, by its frequency.
    seconds: on the links, once.
    overlapped: seconds of compute while it is in flight, once, that no other
      transfer needs; 0 if it is synchronous.
    links: that it uses.
  """

  name: str
  kind: str
  axes: tuple[str, ...]
  bytes: float
  times: float
  seconds: float
  overlapped: float
  links: frozenset[ici.Link]

  @property
  def exposed(self) -> float:
    """Seconds that devices wait for it, once."""
    return max(0.0, self.seconds - self.overlapped)


class Total(NamedTuple):
  """Sums over several collectives, per step."""

  count: float = 0
  bytes: float = 0
  seconds: float = 0
  exposed: float = 0


class _Transfer(NamedTuple):
  """A collective, as HLO has it: `size` is B."""

  name: str
  kind: str
  size: float
  attributes: str
  asynchronous: bool


def collectives(costs: cost.Costs, mesh: Mesh) -> list[Collective]:
  """Collectives of a step, in the order of its compiler schedule.

  Args:
    costs: of the program, compiled for `mesh`.
    mesh: of a whole TPU slice; HLO numbers devices in its order.
  """
  module = costs.module
  measure = _measure(mesh, costs.chip)

  @functools.cache
  def within(name: str) -> list[Collective]:
    """Collectives of a computation that runs once."""
    body, shapes = module.computations[name], hlo.shapes(module, name)
    compute = [one.middle for one in costs.each(name)]
    busy = [{} for _ in body]  # link -> seconds in use, per instruction
    found = [[] for _ in body]
    awaited = []
    for index, instruction in enumerate(body):
      inner, times = costs.inner(instruction)
      for one in within(inner) if inner else ():
        found[index].append(one._replace(times=times * one.times))
        hidden = times * one.times * min(one.seconds, one.overlapped)
        _occupy(busy[index], one.links, hidden)
      transfer = _transfer(module, shapes, instruction)
      if transfer:
        found[index] = [measure(transfer)]
        if transfer.asynchronous:
          begun = _handed_over(body, index)
          awaited.append((_done(module, body, index), begun, index))
    for done, begun, start in sorted(awaited):
      (one,), window = found[start], slice(begun + 1, done)
      overlapped = _cover(one, compute[window], busy[window])
      found[start] = [one._replace(overlapped=overlapped)]
    return [one for some in found for one in some]

  return within(module.entry)


def by_axis(
  collectives: Iterable[Collective],
) -> dict[tuple[str, ...], dict[str, Total]]:
  """Totals by the axes of the mesh and the kind."""
  totals = {}
  for one in collectives:
    kinds = totals.setdefault(one.axes, {})
    before = kinds.get(one.kind, Total())
    each = (1, one.bytes, one.seconds, one.exposed)
    kinds[one.kind] = Total(
      *(a + one.times * b for a, b in zip(before, each, strict=True))
    )
  return totals


def exposed_seconds(collectives: Iterable[Collective]) -> float:
  """Seconds of a step in which devices wait for links."""
  return sum((one.times * one.exposed for one in collectives), 0.0)


def step_seconds(costs: cost.Costs, mesh: Mesh) -> float:
  """Seconds of a step: its compute and its exposed communication."""
  return costs.entry.middle + exposed_seconds(collectives(costs, mesh))


def rings(
  mesh: Mesh, axes: Sequence[str], chip: chips.Chip
) -> tuple[ici.Span, ...] | None:
  """Spans of devices that differ along these axes; None if not a grid."""
  numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
  along = [mesh.axis_names.index(axis) for axis in axes]
  members = np.moveaxis(numbers, along, range(-len(along), 0))
  group = members.reshape(-1, math.prod(mesh.shape[axis] for axis in axes))[0]
  return ici.spans(_torus(mesh, chip), group)


def _torus(mesh, chip):
  places = [device.coords for device in mesh.devices.flat]
  return ici.make_torus(np.array(places), chip)


def _occupy(busy, links, seconds):
  for link in links:
    busy[link] = busy.get(link, 0) + seconds


def _cover(one, compute, busy):
  """Seconds of compute that no other transfer needs; takes what `one` needs."""
  overlapped, need = 0.0, one.seconds
  for seconds, taken in zip(compute, busy, strict=True):
    others = max((taken.get(link, 0) for link in one.links), default=0)
    free = max(0.0, seconds - others)
    overlapped += free
    _occupy(taken, one.links, min(need, free))
    need -= min(need, free)
  return overlapped


def _transfer(module, shapes, instruction) -> _Transfer | None:
  """The transfer that an instruction does or starts; None for others."""
  kind, start = instruction.opcode.removesuffix('-start'), instruction
  asynchronous = kind != instruction.opcode
  if kind not in hlo.COLLECTIVES:
    body = _body(module, instruction)
    start = next((i for i in body if i.opcode in hlo.COLLECTIVES), None)
    if start is None:
      return None
    kind, shapes = start.opcode, {i.name: i.shape for i in body}
    targets = ' '.join(i.attributes for i in body)
    if '"AsyncCollectiveStart"' in targets:
      asynchronous = True
    elif 'async_collective_fusion_config' in start.attributes:
      return None  # a later step of one already started
    elif kind == 'all-reduce' and any(
      i.opcode == 'dynamic-slice' for i in body
    ):
      kind = 'reduce-scatter'  # as the TPU compiler writes it
  sizes = [
    sum(hlo.sizes(shapes[name], on_chip=True)) for name in start.operands
  ]
  size = min(sizes[:2]) if kind == 'ragged-all-to-all' else sum(sizes)
  return _Transfer(instruction.name, kind, size, start.attributes, asynchronous)


def _body(module, instruction):
  """Instructions inside of one that may hold a collective."""
  if instruction.opcode in ('fusion', 'call-start', 'async-start'):
    return module.computations[hlo.called(instruction, 'to_apply|calls')]
  return []


def _handed_over(body, start):
  """Index of the instruction with which a transfer has its operand."""
  if body[start].operands:
    return start
  name = body[start].name
  updates = (
    index
    for index, instruction in enumerate(body)
    if instruction.opcode.endswith('-update') and name in instruction.operands
  )
  return next(updates, start)


def _done(module, body, start):
  """Index of the instruction that awaits a transfer."""
  chain = {body[start].name}
  channel = _channel(module, body[start])
  for index in range(start + 1, len(body)):
    instruction = body[index]
    if chain.isdisjoint(instruction.operands):
      continue
    if instruction.opcode.endswith('-done'):
      return index
    if instruction.opcode == 'fusion' and any(
      '"AsyncCollectiveDone"' in i.attributes
      for i in _body(module, instruction)
    ):
      if _channel(module, instruction) == channel:
        return index
    elif instruction.opcode in ('fusion', 'get-tuple-element') or (
      instruction.opcode.endswith('-update')
    ):
      chain.add(instruction.name)
  return len(body)


def _channel(module, instruction):
  for inner in _body(module, instruction):
    if inner.opcode in hlo.COLLECTIVES:
      return re.search(r'channel_id=(\d+)', inner.attributes).group(1)
  return None


def _measure(mesh, chip):
  """Returns a function from a transfer to its Collective, overlapped=0."""
  torus = _torus(mesh, chip)

  @functools.cache
  def use(kind, devices):
    """Axes, group size, and the use of the links by one byte."""
    groups = hlo.groups(devices, mesh.size)
    move = {
      'all-to-all': ici.all_to_all,
      'collective-permute': ici.permute,
      'ragged-all-to-all': ici.all_to_all,
    }.get(kind, ici.all_gather)
    return _axes(mesh, groups), groups.shape[1], move(torus, groups, 1.0)

  def measure(transfer: _Transfer) -> Collective:
    axes, g, byte = use(transfer.kind, hlo.devices(transfer.attributes))
    sent, moved = {
      'all-gather': (g - 1, g),
      'all-reduce': (2 * (g - 1) / g, 2),
      'collective-permute': (1, 1),
    }.get(transfer.kind, ((g - 1) / g, 1))
    return Collective(
      transfer.name,
      transfer.kind,
      axes,
      bytes=transfer.size * sent,
      times=1,
      seconds=transfer.size * moved * byte.seconds,
      overlapped=0.0,
      links=byte.links,
    )

  return measure


def _axes(mesh, groups):
  """Axes of the mesh along which the members of a group differ."""
  places = np.unravel_index(groups, mesh.devices.shape)
  return tuple(
    name
    for name, place in zip(mesh.axis_names, places, strict=True)
    if (place != place[:, :1]).any()
  )
