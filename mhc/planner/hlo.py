r"""A compiled TPU program as its scheduled HLO text has it.

`parse` reads the text to computations of instructions; `cost` prices them.
"""

from collections.abc import Mapping
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
COLLECTIVES = frozenset(
  {
    'all-gather',
    'all-reduce',
    'all-to-all',
    'collective-permute',
    'ragged-all-to-all',
    'reduce-scatter',
  }
)


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


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


def branch_frequency(module: Module, control: Instruction) -> float:
  """How often a loop, or a conditional's costly branch, runs; see `parse`."""
  return module.frequencies.get(scope(control), 1.0)


def scope(control: Instruction) -> str:
  """The scope directly around a loop or a conditional: .../scope/cond.

  Anything inside of it, such as the loop .../scope/cond/branch_1_fun/while,
  runs whenever it does.
  """
  found = re.search(r'op_name="[^"]*?([^"/]+)/[^"/]+"', control.attributes)
  return found.group(1) if found else ''


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
