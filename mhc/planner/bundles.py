"""Bundle counts of TPU kernels, from the compiler's dump, without a TPU.

The compiler dumps the instructions of every kernel to a folder. A bundle is
what a core issues in one cycle, so their number is the core's time for a tile,
deterministic and free of noise. It excludes waits for memory and the stalls
that the compiler leaves to the hardware.
"""

import os
import pathlib
import re
import tempfile

_LINE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*(>*)\s*\{')
_LAST = re.compile(r',\s*(\d+) /\* loop exit test')


def folder() -> pathlib.Path:
  """Makes the compiler dump to a new folder; call before it is loaded."""
  path = tempfile.mkdtemp(prefix='mhc-schedule-')
  flags = f'--xla_jf_dump_to={path} --xla_jf_dump_llo_text=true'
  flags = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {flags}'
  os.environ['LIBTPU_INIT_ARGS'] = flags.strip()
  return pathlib.Path(path)


def bundles(path: pathlib.Path, kernel: str, steps: int = 2) -> int:
  """Bundles of one grid step of a kernel, its loops times their trips.

  Reads the newest dump of that name.

  Args:
    path: from `folder`.
    kernel: its name.
    steps: of the grid, on one core. A single one is no loop.

  Raises:
    FileNotFoundError: there is no dump of that name.
  """
  texts = sorted(path.glob(f'*{kernel}*[0-9]-final_bundles.txt'))
  if not texts:
    raise FileNotFoundError(
      f'{path} holds no dump of {kernel}: the TPU compiler was loaded before '
      'the dump was requested; start a new process'
    )
  return count_bundles(texts[-1].read_text(), steps)


def empty(path: pathlib.Path):
  """Deletes the dumps, some 100 MB a program."""
  for file in path.iterdir():
    file.unlink()


def count_bundles(text: str, steps: int = 2) -> int:
  """Bundles of one grid step: of an iteration of the outermost loop.

  A line shows the loop depth at which its first instruction was written, which
  may be less than the bundle's: a loop ends with the last line that shows its
  depth. Its bound is on the line that tests its exit.
  """
  lines = [line for line in text.splitlines() if _LINE.match(line)]
  tags, depths = [], []
  for line in lines:
    tag, marks = _LINE.match(line).groups()
    tags.append(tag)
    depths.append(len(marks))
  loops = []  # (first, last, depth), outer before inner
  for first, (tag, depth) in enumerate(zip(tags, depths, strict=True)):
    if tag != 'LB':
      continue
    last = first
    for number in range(first + 1, len(lines)):
      if tags[number] == 'LB' and depths[number] <= depth:
        break
      if depths[number] >= depth:
        last = number
    loops.append((first, last, depth))
  if steps == 1:
    loops.insert(0, (0, len(lines) - 1, -1))  # all of it, once
  if not loops:
    raise ValueError('the dump has no loop over grid steps')
  bounds = {}
  for number, line in enumerate(lines):
    bound = _LAST.search(line)
    around = [
      loop
      for loop in loops
      if loop[0] <= number <= loop[1] and loop not in bounds and loop[2] >= 0
    ]
    if bound and around:
      bounds[around[-1]] = int(bound.group(1))
  grid = loops[0]
  total = 0
  for number in range(grid[0], grid[1] + 1):
    turns = 1
    for loop in loops[1:]:
      if loop[0] <= number <= loop[1]:
        turns *= bounds.get(loop, 1)
    total += turns
  return total
