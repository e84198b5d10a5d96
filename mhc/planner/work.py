"""What an instruction of a compiled program does: bytes moved, FLOPs.

Bytes are those of operands read and results written; a slice counts what it
takes, an update in place what it writes. FLOPs are of matrix products, which
TPU compilers write as convolutions, wherever they are fused into.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from mhc.planner import hlo

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
# A custom call that gives memory, and touches none of it.
ALLOCATION = 'custom_call_target="AllocateBuffer"'
UPDATE = 'dynamic-update-slice'
Shapes = dict[str, str]  # of a computation's instructions


class Work(NamedTuple):
  """What one instruction does when it runs once."""

  hbm_bytes: float = 0  # read and written in HBM
  bytes: float = 0  # in HBM and in the vector memory of the cores
  flops: float = 0  # of products


def of(
  module: hlo.Module, instruction: hlo.Instruction, shapes: Shapes
) -> Work:
  """The work of an instruction that is not control flow.

  Args:
    module: its program.
    instruction: one of a computation.
    shapes: of that computation's instructions, `hlo.shapes`.
  """
  if instruction.opcode in FREE or ALLOCATION in instruction.attributes:
    return Work()
  return Work(
    _moved(module, instruction, shapes, on_chip=False),
    _moved(module, instruction, shapes, on_chip=True),
    _flops(module, instruction, shapes),
  )


def _moved(module, instruction, shapes, on_chip):
  def size(shape):
    return sum(hlo.sizes(shape, on_chip))

  written = size(instruction.shape)
  match instruction.opcode:
    case 'dynamic-slice' | 'gather' | 'slice':
      return 2 * written
    case 'dynamic-update-slice':
      return 2 * size(shapes.get(instruction.operands[1], ''))
    case 'fusion':
      body = module.computations[hlo.called(instruction, 'calls')]
      return _fused(module, body, instruction, shapes, size)
  return written + sum(size(shapes.get(o, '')) for o in instruction.operands)


def _fused(module, body, instruction, shapes, size):
  """Bytes of a fusion; an operand that is only sliced counts its slices."""
  written, read = size(instruction.shape), 0
  for parameter in (i for i in body if i.opcode == 'parameter'):
    name = instruction.operands[int(parameter.operands[0])]
    given = size(shapes.get(name, ''))
    taken, updated = _touched(module, body, parameter.name, size)
    read += min(given, taken)
    if updated is not None:  # in place: of the result only that is written
      written -= given - min(given, updated)
  return read + max(0, written)


def _touched(module, body, name, size):
  """Bytes read of an array in a fusion, and of its updates in place, if any.

  Bitcasts and fusions inside are followed; infinity is all of it.
  """
  inner = {i.name: i for i in body}
  read, updated = 0, None
  uses = [i for i in body if name in i.operands]
  for use in uses:
    first = use.operands[0] == name
    match use.opcode:
      case 'dynamic-slice' | 'gather' if first:
        read += size(use.shape)
      case 'dynamic-slice' | 'gather' | 'dynamic-update-slice' if (
        name in use.operands[2:] or (use.opcode != UPDATE and not first)
      ):
        read += size(inner[name].shape)  # it says where
      case 'dynamic-update-slice' if first:
        updated = (updated or 0) + size(inner[use.operands[1]].shape)
      case 'bitcast':
        more, changed = _touched(module, body, use.name, size)
        read += more
        updated = updated if changed is None else (updated or 0) + changed
      case 'fusion':
        called = module.computations[hlo.called(use, 'calls')]
        places = [
          n for n, operand in enumerate(use.operands) if operand == name
        ]
        for parameter in (i for i in called if i.opcode == 'parameter'):
          if int(parameter.operands[0]) in places:
            more, changed = _touched(module, called, parameter.name, size)
            read += math.inf if changed is not None else more
      case _:
        read = math.inf
  return read if uses else 0, updated


def _flops(module, instruction, shapes):
  match instruction.opcode:
    case 'convolution':
      return _convolution(instruction, shapes)
    case 'dot':
      return _dot(instruction, shapes)
    case 'fusion':
      name = hlo.called(instruction, 'calls')
      inner = hlo.shapes(module, name)
      body = module.computations[name]
      return sum(_flops(module, one, inner) for one in body)
  return 0


def _dimensions(shape):
  found = re.match(r'\w+\[([\d,]*)\]', shape).group(1)
  return [int(extent) for extent in found.split(',') if extent]


def _convolution(instruction, shapes):
  """2 for each result, input feature and place of the window that is filled.

  A batch of products is a dimension whose window sees one place of the input,
  for all else is padding or between the places of a dilated input.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  of = [shapes[name] for name in instruction.operands] + [instruction.shape]
  image, kernel, result = (
    dict(zip(names, _dimensions(shape), strict=True))
    for names, shape in zip(labels.groups(), of, strict=True)
  )
  window = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  fields = re.findall(r'(\w+)=(\S+)', window.group(1)) if window else []
  fields = {name: values.split('x') for name, values in fields}
  filled = 1
  for place, size in enumerate(fields.get('size', ())):
    stride, pad, apart, spread = (
      int(fields[name][place].split('_')[0]) if name in fields else default
      for name, default in (
        ('stride', 1),
        ('pad', 0),
        ('lhs_dilate', 1),
        ('rhs_dilate', 1),
      )
    )
    axis = str(place)
    first = np.arange(result[axis])[:, None] * stride - pad
    seen = first + np.arange(int(size)) * spread
    last = (image[axis] - 1) * apart
    filled *= int(((seen >= 0) & (seen <= last) & (seen % apart == 0)).sum())
  return 2 * result['b'] * result['f'] * kernel['i'] * filled


def _dot(instruction, shapes):
  left = _dimensions(shapes[instruction.operands[0]])
  summed = re.search(
    r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes
  )
  axes = [int(axis) for axis in summed.group(1).split(',') if axis]
  extent = math.prod(left[axis] for axis in axes)
  return 2 * math.prod(_dimensions(instruction.shape)) * extent
