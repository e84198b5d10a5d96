r"""Seconds of a compiled TPU program: two bounds and an estimate between them.

An instruction with b bytes in HBM, B of the chip's bytes a second, f FLOPs of F
a second and c cycles that the compiler estimates takes

    low     max(b / B, f / F)
    high    max(low, c / clock); without cycles BLIND b / B
    middle  c / clock for a product
            b / (STREAMED B) for what only moves and changes arrays, at least
            their registers through a core, at most c / clock

The compiler's cycles are right for products, but several times too many for
copies, broadcasts and element-wise work, and missing for gathers, scatters and
sorts. A kernel is bounded by its matrix unit, its bytes and, where they were
counted, by its bundles (`kernel_bundles`): a bundle is a cycle of a core.

A loop counts its trips, a conditional its most expensive branch; `parse` has
the fraction of ticks that a pipeline takes it.
"""

from collections.abc import Iterator, Mapping
import functools
import math
import re
import types
from typing import NamedTuple

from mhc.kernels import chips
from mhc.planner import hlo
from mhc.planner import work

# Of the bandwidth of HBM that plain array code reaches. Assumed, not fitted;
# docs/planner.md holds plans against speeds that others measured.
STREAMED = 0.8
# How much slower than HBM's peak what has no estimate may be, at worst.
BLIND = 3.0
REGISTER = 4096  # bytes that a core loads in a cycle
LATENCY = 1e-6  # seconds, of anything that goes to HBM and back
# The value of cycles that were not estimated.
UNKNOWN = 2**63 - 1
RAGGED_ROWS = 128  # of a tile of libtpu's ragged_dot
# Of the peak that it reaches: no more than a plain product of 8192^3, by the
# compiler's cycles.
RAGGED = 0.9


class Cost(NamedTuple):
  """The cost of running something once, its loops in full."""

  low: float = 0  # seconds
  middle: float = 0
  high: float = 0
  hbm_bytes: float = 0
  flops: float = 0  # of products and, as they say themselves, of kernels
  compiler: float = 0  # by its cycles, the middle where it has none

  def plus(self, other: 'Cost', times: float = 1) -> 'Cost':
    return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Assumed(NamedTuple):
  """What no HLO text says.

  Attributes:
    bundles: of all steps of a kernel on one core, by `kernel_key`.
    live: the fraction of the rows of a ragged product that are there.
  """

  bundles: Mapping[tuple[str, str], float] = types.MappingProxyType({})
  live: float = 1.0


NOTHING = Assumed()


class Leaf(NamedTuple):
  """An instruction that is not control flow, with all its runs in a step."""

  instruction: hlo.Instruction
  computation: str
  times: float
  cost: Cost  # of one run
  scopes: tuple[str, ...]  # of the conditionals around it, outer first


class Costs:
  """Costs of a program's computations and instructions."""

  def __init__(
    self, module: hlo.Module, chip: chips.Chip, assumed: Assumed = NOTHING
  ):
    self.module, self.chip, self.assumed = module, chip, assumed
    self._found: dict[str, list[Cost]] = {}

  @property
  def entry(self) -> Cost:
    """The cost of the entire program."""
    return self.of(self.module.entry)

  def of(self, name: str) -> Cost:
    """The cost of a computation, run once."""
    return total(self.each(name))

  def each(self, name: str) -> list[Cost]:
    """The costs of the instructions of a computation."""
    if name not in self._found:
      shapes = hlo.shapes(self.module, name)
      self._found[name] = [
        self._one(instruction, shapes)
        for instruction in self.module.computations[name]
      ]
    return self._found[name]

  def inner(self, instruction: hlo.Instruction) -> tuple[str, float]:
    """The computation that control flow runs, and its times; '' for others."""
    module = self.module
    match instruction.opcode:
      case 'while':
        times = hlo.trips(module, instruction)
        frequency = hlo.branch_frequency(module, instruction)
        return hlo.called(instruction, 'body'), times * frequency
      case 'conditional':
        most = max(hlo.branches(instruction), key=lambda b: self.of(b).middle)
        return most, hlo.branch_frequency(module, instruction)
      case 'call' | 'call-start':  # the latter on a SparseCore
        return hlo.called(instruction, 'to_apply'), 1.0
      case 'async-start':
        return hlo.called(instruction, 'calls'), 1.0
    return '', 0.0

  def leaves(self) -> Iterator[Leaf]:
    """Every instruction that the program runs, with its times."""
    yield from self._leaves(self.module.entry, 1.0, ())

  def _leaves(self, name, times, scopes):
    body = self.module.computations[name]
    for instruction, cost in zip(body, self.each(name), strict=True):
      inner, number = self.inner(instruction)
      if not inner:
        yield Leaf(instruction, name, times, cost, scopes)
      elif number:
        here = hlo.scope(instruction)
        around = (*scopes, here) if here in self.module.frequencies else scopes
        yield from self._leaves(inner, times * number, around)

  def _one(self, instruction, shapes) -> Cost:
    inner, times = self.inner(instruction)
    if inner:
      return Cost().plus(self.of(inner), times)
    return price(self.module, instruction, shapes, self.chip, self.assumed)


def total(costs) -> Cost:
  return functools.reduce(Cost.plus, costs, Cost())


def price(
  module: hlo.Module,
  instruction: hlo.Instruction,
  shapes: dict[str, str],
  chip: chips.Chip,
  assumed: Assumed = NOTHING,
) -> Cost:
  """Cost of an instruction that is not control flow."""
  found = _price(module, instruction, shapes, chip, assumed)
  blind = instruction.opcode in ('sort', 'custom-call')
  blind |= _cycles(instruction) is None
  return found._replace(compiler=found.middle if blind else found.high)


def _price(module, instruction, shapes, chip, assumed) -> Cost:
  kind = instruction.opcode
  if kind in work.FREE or kind.endswith(('-start', '-update')):
    return Cost()
  if kind.endswith('-done') or kind in hlo.COLLECTIVES:
    # It goes beside other work; the time on links is that of `collectives`.
    moved = (sum(hlo.sizes(shapes.get(o, ''))) for o in instruction.operands)
    return Cost(hbm_bytes=sum(moved))
  done = work.of(module, instruction, shapes)
  if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
    return _kernel(instruction, shapes, done, chip, assumed)
  cycles = _cycles(instruction)
  streamed = done.hbm_bytes / chip.bandwidth
  product = done.flops / chip.flops
  low = max(streamed, product)
  if instruction.opcode == 'sort':
    middle = max(low / STREAMED, _sorting(shapes, instruction, done, chip))
    return Cost(low, middle, BLIND * middle, done.hbm_bytes)
  if cycles is None and _sends(module, instruction):
    return Cost(hbm_bytes=done.hbm_bytes)
  if cycles is None:
    middle = streamed / STREAMED + (LATENCY if done.hbm_bytes else 0)
    high = max(middle, BLIND * streamed)
    return Cost(low, middle, high, done.hbm_bytes, done.flops)
  scheduled = max(low, cycles / chip.clock)
  if done.flops:
    return Cost(low, scheduled, scheduled, done.hbm_bytes, done.flops)
  through = done.bytes / (REGISTER * chip.clock * chip.cores)
  waiting = streamed / STREAMED + (LATENCY if done.hbm_bytes else 0)
  middle = max(low, min(scheduled, max(waiting, through)))
  return Cost(low, middle, scheduled, done.hbm_bytes)


def _sends(module, instruction):
  """Whether a fusion starts or awaits a collective, and does nothing else."""
  if instruction.opcode != 'fusion':
    return False
  body = module.computations[hlo.called(instruction, 'calls')]
  return any(one.opcode in hlo.COLLECTIVES for one in body)


def _cycles(instruction) -> float | None:
  """Those that the compiler estimates; None where it does not."""
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  if not found or int(found.group(1)) == UNKNOWN:
    return None
  return float(found.group(1))


def _sorting(shapes, instruction, done, chip):
  """A bitonic network: log2(n) (log2(n) + 1) / 2 passes over the registers."""
  rows = max(sum(hlo.sizes(shapes[o], True)) for o in instruction.operands) / 4
  depth = math.log2(max(2, rows))
  passes = depth * (depth + 1) / 2
  return passes * done.bytes / (REGISTER * chip.clock * chip.cores)


def kernel_key(instruction: hlo.Instruction) -> tuple[str, str]:
  """A kernel's own name, and the dtypes and shapes of its results."""
  found = re.search(r'(\w+)\)*/pallas_call"', instruction.attributes)
  name = found.group(1) if found else re.sub(r'[._\d]+$', '', instruction.name)
  return name, ' '.join(re.findall(r'\w+\[[\d,]*\]', instruction.shape))


def _kernel(instruction, shapes, done, chip, assumed) -> Cost:
  """Cost of a kernel: by what it says of itself, and by its schedule."""
  estimate = re.search(
    r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"',
    instruction.attributes,
  )
  flops, moved = (
    map(float, estimate.groups()) if estimate else (0.0, done.hbm_bytes)
  )
  if instruction.name.startswith('ragged-dot') and flops:
    return _ragged(instruction, shapes, flops, moved, chip, assumed)
  low = max(flops / chip.flops, moved / chip.bandwidth)
  key = kernel_key(instruction)
  if key in assumed.bundles:
    cores = assumed.bundles[key] / chip.clock
    middle = max(cores, flops / chip.flops, moved / chip.bandwidth / STREAMED)
    high = max(middle, cores + moved / chip.bandwidth / STREAMED)
    return Cost(low, middle, high, moved, flops)
  # Own kernels took 1 to 2 times the longer of both.
  return Cost(low, (1 + BLIND) / 2 * low, BLIND * low, moved, flops)


def _ragged(instruction, shapes, flops, moved, chip, assumed) -> Cost:
  """libtpu's grouped product: live rows, and tiles that two groups share.

  Its estimate is for all rows of the buffer, at the peak.
  """
  extents = [
    [int(n) for n in found.split(',')]
    for name in (*instruction.operands, instruction.name)
    for found in re.findall(r'\w+\[([\d,]+)\]', shapes.get(name, ''))
  ]
  groups = max((e[0] for e in extents if len(e) == 3), default=1)
  rows = max((e[0] for e in extents if len(e) == 2), default=1)
  live = assumed.live + (groups - 1) * RAGGED_ROWS / rows
  low = max(assumed.live * flops / chip.flops, moved / chip.bandwidth)
  product = flops / (RAGGED * chip.flops)
  middle = max(live * product, moved / chip.bandwidth / STREAMED)
  high = max(middle, (1 + live - assumed.live) * product)
  return Cost(low, middle, high, moved, assumed.live * flops)
