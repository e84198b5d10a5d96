r"""Costs of a compiled TPU program, from its scheduled HLO text.

XLA's own totals count the body of a loop once. Here every instruction counts as
often as its loops run:

    cycles(c) = sum of estimated_cycles of c's instructions
                + sum over loops of trips * cycles(body)

and likewise for bytes. Only TPU compilers write `estimated_cycles`; kernels
carry a cost estimate of their own instead (FLOPs and bytes). SparseCore
instructions without cycles are assumed to be bound by their bytes.
"""

from collections.abc import Iterable, Mapping
import functools
import math
import re
import types
from typing import NamedTuple

from jaxtyping import Int
import numpy as np

DTYPE_BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  'bf16': 2,
  'f16': 2,
  's16': 2,
  'u16': 2,
  'f32': 4,
  's32': 4,
  'u32': 4,
  'f64': 8,
  's64': 8,
  'u64': 8,
}
# The value of cycles that were not estimated.
UNKNOWN = 2**63 - 1
# Opcodes that name, select or wait, and move no data.
FREE = frozenset(
  {
    'after-all',
    'bitcast',
    'constant',
    'get-tuple-element',
    'iota',
    'opt-barrier',
    'parameter',
    'partition-id',
    'replica-id',
    'tuple',
  }
)


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


class Cost(NamedTuple):
  """The cost of running a computation once, its loops in full."""

  cycles: float = 0  # estimated by the compiler
  bytes: float = 0  # read and written in HBM
  kernel_flops: float = 0  # of kernels (custom calls), which have no cycles
  kernel_bytes: float = 0
  kernel_seconds: float = 0  # kernels at their roofline, and unknown cycles

  def plus(self, other: 'Cost', times: float = 1) -> 'Cost':
    return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Module(NamedTuple):
  """Computations by name, instructions in the order of the schedule."""

  computations: dict[str, list[Instruction]]
  entry: str
  frequencies: Mapping[str, float] = types.MappingProxyType({})


def parse(
  text: str, frequencies: Mapping[str, float] = types.MappingProxyType({})
) -> Module:
  """Parses `compiled.as_text()`.

  `frequencies` gives how often a conditional takes its most expensive branch,
  or a loop its trips, by the `jax.named_scope` around it; 1 for others.
  """
  computations, entry, body = {}, '', []
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      name = re.search(r'%([^\s(]+)', line).group(1)
      body = computations.setdefault(name, [])
      if line.startswith('ENTRY'):
        entry = name
    elif line.startswith('  ') and ' = ' in line:
      body.append(_instruction(line))
  return Module(computations, entry, frequencies)


def cost(
  module: Module, peak: tuple[float, float] = (math.inf, math.inf)
) -> Cost:
  """Cost of the entire program; `peak` is FLOPs and bytes a second."""
  return total(costs(module, peak)[module.entry])


def costs(
  module: Module, peak: tuple[float, float] = (math.inf, math.inf)
) -> dict[str, list[Cost]]:
  """Costs of each instruction, in the computations that control flow runs.

  A loop costs its trips, a conditional its most expensive branch; see
  `branch_frequency`.
  """
  found = {}

  def of(name) -> Cost:
    if name not in found:
      arrays = shapes(module, name)
      found[name] = [one(i, arrays) for i in module.computations[name]]
    return total(found[name])

  def one(instruction, arrays) -> Cost:
    match instruction.opcode:
      case 'while':
        body = of(called(instruction, 'body'))
        times = trips(module, instruction) * branch_frequency(
          module, instruction
        )
        return Cost().plus(body, times)
      case 'conditional':
        most = max(map(of, branches(instruction)))
        return Cost().plus(most, branch_frequency(module, instruction))
      case 'call' | 'async-start':
        return of(called(instruction, 'to_apply|calls'))
    return _single(module, instruction, arrays, peak)

  of(module.entry)
  return found


def total(costs: Iterable[Cost]) -> Cost:
  return functools.reduce(Cost.plus, costs, Cost())


def branch_frequency(module: Module, control: Instruction) -> float:
  """How often a loop, or a conditional's costly branch, runs; see `parse`."""
  # The scope directly around it: .../scope/cond. Anything inside of it, such as
  # the loop .../scope/cond/branch_1_fun/while, runs whenever it does.
  found = re.search(r'op_name="[^"]*?([^"/]+)/[^"/]+"', control.attributes)
  return module.frequencies.get(found.group(1), 1.0) if found else 1.0


def branches(conditional: Instruction) -> list[str]:
  """The computations of a conditional, of which it runs one."""
  found = re.search(
    r'(?:branch_computations=\{|true_computation=)([^}]*)',
    conditional.attributes,
  )
  return re.findall(r'%([^\s,}]+)', found.group(1))


def trips(module: Module, loop: Instruction) -> int:
  """Trip count of a `while`: the bound that its counter is compared with.

  JAX's scans count from 0 by 1. A loop with another condition counts once.
  """
  condition = module.computations[called(loop, 'condition')]
  bounds = {
    i.name: int(i.operands[0])
    for i in condition
    if i.opcode == 'constant' and i.shape.startswith('s32[]')
  }
  for instruction in condition:
    if 'direction=LT' in instruction.attributes and len(bounds) == 1:
      return next(iter(bounds.values()))
  return 1


def sizes(shape: str, on_chip: bool = False) -> list[int]:
  """Bytes of each array of a shape.

  Args:
    shape: of an array or a tuple.
    on_chip: also count arrays in on-chip memory, marked S(n).
  """
  return [
    0
    if re.search(r'S\(\d+\)', layout) and not on_chip
    else DTYPE_BYTES.get(dtype, 4)
    * math.prod(int(extent) for extent in dims.split(',') if extent)
    for dtype, dims, layout in re.findall(
      r'(\w+)\[([\d,]*)\](\{[^}]*\})?', shape
    )
  ]


def called(instruction: Instruction, role: str) -> str:
  """The computation that an instruction runs in that role."""
  pattern = rf'\b(?:{role})=%([^\s,)]+)'
  return re.search(pattern, instruction.attributes).group(1)


def shapes(module: Module, name: str) -> dict[str, str]:
  """Shapes of a computation's instructions, by name."""
  return {i.name: i.shape for i in module.computations[name]}


def devices(attributes: str) -> str:
  """Device groups or pairs of a collective, as text; '' for all devices."""
  found = re.search(
    r'(?:replica_groups|source_target_pairs)=(mesh.*?\}|.*?)(?=, \w+=|$)',
    attributes,
  )
  return found.group(1) if found else ''


def groups(text: str, number: int) -> Int[np.ndarray, 'groups members']:
  """Parses `devices` to [groups, members], or [pairs, source and target].

  Three notations exist. {{0,2},{1,3}}, where {} is one group of all `number`.
  [2,2]<=[2,2]T(1,0), a range that is transposed and reshaped.
  mesh['a'=2,'b'=2] {'a'}, where 'a':(2)4 is a part of an axis, the middle one
  of [2, 4, rest], and device_ids=(...) another order of devices than a range.
  """
  if text.startswith('['):
    shape, order = text.split('<=')
    return _order(order).reshape(_integers(shape))
  if not text.startswith('mesh'):
    rows = [_integers(row) for row in re.findall(r'\{([\d,]+)\}', text)]
    return np.array(rows or [range(number)])
  axes, _, wanted = text.partition('] ' if 'device_ids' not in text else '], ')
  sizes = {a: int(n) for a, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  ids = re.search(r'device_ids=\((.*)\) \{', wanted)
  order = _order(ids.group(1) if ids else f'[{math.prod(sizes.values())}]')
  parts = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(
      r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted
    )
  }
  shape = []
  for name, size in sizes.items():
    before, part = parts.get(name, (size, 1))
    shape += [before, part, size // (before * part)]
  members = range(1, len(shape), 3)
  array = np.moveaxis(order.reshape(shape), members, range(-len(members), 0))
  return array.reshape(-1, math.prod(shape[1::3]))


def _order(text):
  """Parses the order of devices in '[4,2]T(1,0)' or '2,0,1'."""
  if not text.startswith('['):
    return np.array(_integers(text))
  dimensions, _, axes = text.partition('T')
  shape = _integers(dimensions)
  array = np.arange(math.prod(shape)).reshape(shape)
  return array.transpose(_integers(axes) or None).ravel()


def _integers(text):
  return [int(number) for number in re.findall(r'\d+', text)]


def _single(module, instruction, shapes, peak) -> Cost:
  """Cost of an instruction that is not control flow."""
  if instruction.opcode in FREE or instruction.opcode.endswith('-start'):
    return Cost()
  cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  moved = _moved(module, instruction, shapes)
  kernel = re.search(
    r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"',
    instruction.attributes,
  )
  if kernel:
    flops, accessed = map(float, kernel.groups())
    seconds = max(flops / peak[0], accessed / peak[1])
    return Cost(0, moved, flops, accessed, seconds)
  estimated = int(cycles.group(1)) if cycles else 0
  if estimated == UNKNOWN:
    return Cost(bytes=moved, kernel_seconds=moved / peak[1])
  return Cost(float(estimated), moved)


def _moved(module, instruction, shapes):
  """Bytes of operands read and results written; slices count their extent."""
  written = sum(sizes(instruction.shape))
  match instruction.opcode:
    case 'dynamic-slice' | 'gather' | 'slice':
      return 2 * written
    case 'dynamic-update-slice':
      return 2 * sum(sizes(shapes.get(instruction.operands[1], '')))
    case 'fusion':
      body = called(instruction, 'calls')
      return _fused(module, body, instruction, shapes, written)
  return written + sum(
    sum(sizes(shapes.get(name, ''))) for name in instruction.operands
  )


def _fused(module, name, instruction, shapes, written):
  """Bytes of a fusion; an operand that is only sliced counts its slices."""
  body = module.computations[name]
  inner = {i.name: i for i in body}
  users = {}
  for user in body:
    for operand in user.operands:
      users.setdefault(operand, []).append(user)

  read = 0
  for parameter in (i for i in body if i.opcode == 'parameter'):
    size = sum(
      sizes(shapes.get(instruction.operands[int(parameter.operands[0])], ''))
    )
    uses = users.get(parameter.name, [])
    if uses and all(use.opcode == 'dynamic-slice' for use in uses):
      size = min(size, sum(sum(sizes(use.shape)) for use in uses))
    elif uses and all(
      use.opcode == 'dynamic-update-slice' and use.operands[0] == parameter.name
      for use in uses
    ):
      # Updated in place: only the update is written.
      updates = [sum(sizes(inner[use.operands[1]].shape)) for use in uses]
      written -= size - min(size, sum(updates))
      size = 0
    read += size
  return read + max(0, written)


def _instruction(line):
  name, _, rest = line.strip().removeprefix('ROOT ').partition(' = ')
  rest = re.sub(r'/\*.*?\*/', '', rest)
  shape, rest = _leading(rest) if rest[0] == '(' else _word(rest)
  opcode, _, rest = rest.strip().partition('(')
  inside, attributes = _leading('(' + rest)
  operands = tuple(
    part.split()[-1].lstrip('%')
    for part in _split(inside[1:-1])
    if part.strip()
  )
  return Instruction(name.lstrip('%'), shape, opcode, operands, attributes)


def _leading(text):
  """Splits off the leading parenthesised part."""
  depth = 0
  for position, char in enumerate(text):
    depth += (char == '(') - (char == ')')
    if depth == 0:
      return text[: position + 1], text[position + 1 :]
  raise AssertionError(f'unbalanced: {text[:80]}')


def _word(text):
  head, _, rest = text.partition(' ')
  return head, rest


def _split(text):
  """Splits at the commas that no bracket encloses."""
  parts, depth, start = [], 0, 0
  for position, char in enumerate(text):
    depth += (char in '([{') - (char in ')]}')
    if char == ',' and depth == 0:
      parts.append(text[start:position])
      start = position + 1
  return [*parts, text[start:]]
