"""Names of TPU slices: as Cloud says them, and as the compiler reads them.

Cloud counts TensorCores, two a chip, in v4-N and v5p-N; chips in v5litepod-N,
v5e-N and v6e-N (https://cloud.google.com/tpu/docs). A slice of so many is a
torus whose sides are as equal as powers of two allow.
"""

import math
import re

# Cloud's name: (the compiler's, cores a chip, dimensions of the torus).
FAMILIES = {
  'v4': ('v4', 2, 3),
  'v5p': ('v5p', 2, 3),
  'v5e': ('v5e', 1, 2),
  'v5litepod': ('v5e', 1, 2),
  'v6e': ('v6e', 1, 2),
}
SPELLINGS = {'v7x': 'tpu7x', 'v5litepod': 'v5e', 'v5lite': 'v5e'}


def topology(name: str) -> str:
  """The compiler's name of a slice: v5p:8x8x8 for v5p-1024.

  Names of other forms, such as GPUs', are returned as they are.

  Raises:
    ValueError: there is no slice of that number.
  """
  family, sign, size = re.fullmatch(r'([^:-]*)([:-]?)(.*)', name).groups()
  if sign == ':':
    return f'{SPELLINGS.get(family, family)}:{size}'
  if sign != '-' or family not in FAMILIES or not size.isdigit():
    return name
  compiler, cores, dimensions = FAMILIES[family]
  chips, rest = divmod(int(size), cores)
  if rest or chips < 1 or chips & (chips - 1):
    sides = 'x'.join('448'[-dimensions:])
    raise ValueError(
      f'{name}: a slice has a power of two of chips, of {cores} core(s) each; '
      f'name another by its sides, such as {compiler}:{sides}'
    )
  return f'{compiler}:{"x".join(map(str, _sides(chips, dimensions)))}'


def num_devices(name: str) -> int:
  """The devices of a topology as the compiler names it, of h100:8 as well.

  Raises:
    ValueError: the name has no sides.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
  if not found:
    raise ValueError(
      f'topology={name!r} has no sides: give a TPU slice such as v5p-1024 or '
      'v5p:8x8x8, or GPUs such as h100:8'
    )
  chips = math.prod(map(int, found[2].split('x')))
  return 2 * chips if found[1] == 'tpu7x' else chips


def _sides(chips, dimensions) -> list[int]:
  """The sides, the shortest first; a flat slice of four chips is 2x2x1."""
  if dimensions == 3 and chips <= 4:
    return [*_sides(chips, 2), 1]
  exponent = chips.bit_length() - 1
  low, more = divmod(exponent, dimensions)
  return [2 ** (low + (i >= dimensions - more)) for i in range(dimensions)]
