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
_EMPTY = re.compile(r':\s*\{\}')
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

  The depth of a bundle in loops is marked on its line; a loop's bound stands
  where its exit is tested.
  """
  counts, bounds = [], []  # of the loops, outermost first, in order
  open_loops = []
  for line in text.splitlines():
    match = _LINE.match(line)
    if not match:
      continue
    tag, depth = match.group(1), len(match.group(2))
    if tag == 'LB':
      del open_loops[depth - 1 :]
      open_loops.append(len(counts))
      counts.append((0, tuple(open_loops)))
      bounds.append(1)
    elif _EMPTY.search(line):
      pass  # nothing issued; such lines do not show their depth
    else:
      del open_loops[depth:]
    if not open_loops:
      continue
    here = open_loops[-1]
    count, outer = counts[here]
    counts[here] = (count + 1, outer)
    last = _LAST.search(line)
    if last:
      bounds[here] = int(last.group(1))
  if not counts:
    raise ValueError('no loop over grid steps in this schedule')
  total = 0
  for count, outer in counts:
    for loop in outer[1:]:
      count *= bounds[loop]
    total += count
  return total
