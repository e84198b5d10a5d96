"""What a TPU's compiler makes of a kernel, without the TPU.

The compiler writes the instructions of every kernel to a folder. A bundle is
what a core issues in one cycle, so their number is the time of a tile as far as
the core is concerned: deterministic, and without noise. Waiting for memory is
not in it, nor are the stalls that the compiler leaves to the hardware.
"""

import os
import pathlib
import re
import tempfile

_LINE = re.compile(r'\s*(?:0x[0-9a-f]+|0)\s+(?:([A-Z]{2})\s*)?:\s*(>*)\s*\{')
_LAST = re.compile(r',\s*(\d+) /\* loop exit test')


def folder() -> pathlib.Path:
  """Asks the compiler to write to a new folder; before it is loaded."""
  path = tempfile.mkdtemp(prefix='mhc-schedule-')
  flags = f'--xla_jf_dump_to={path} --xla_jf_dump_llo_text=true'
  flags = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {flags}'
  os.environ['LIBTPU_INIT_ARGS'] = flags.strip()
  return pathlib.Path(path)


def bundles(path: pathlib.Path, kernel: str) -> int:
  """Bundles of one grid step of a kernel, its loops in full.

  The newest compilation counts.

  Raises:
    FileNotFoundError: none of that name was written.
  """
  texts = sorted(path.glob(f'*{kernel}*[0-9]-final_bundles.txt'))
  if not texts:
    raise FileNotFoundError(
      f'no schedule of {kernel} in {path}: the TPU compiler was loaded before '
      'it was asked to write them; start in a new process'
    )
  return count_bundles(texts[-1].read_text())


def empty(path: pathlib.Path):
  """What was written is large: some 100 MB a program."""
  for file in path.iterdir():
    file.unlink()


def count_bundles(text: str) -> int:
  """Bundles of one turn of the outermost loop, which is over grid steps.

  A line shows how deep in loops its first instruction was written, which may be
  less than where the bundle has been put: a loop ends with the last line that
  shows its depth. Its bound stands where its exit is tested.
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
  if not loops:
    raise ValueError('no loop over grid steps in this schedule')
  bounds = {}
  for number, line in enumerate(lines):
    bound = _LAST.search(line)
    around = [
      loop
      for loop in loops
      if loop[0] <= number <= loop[1] and loop not in bounds
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
