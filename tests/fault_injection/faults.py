"""Faults for the trials of harness.py.

Those of files are `truncate`, `flip` and `fill`; those of a process, which is
started as

    python faults.py nan launch/train.py --workdir=...

    nan      the loss and the gradient of a batch that holds a byte 1 are NaN
    clock    the time of day jumps by years, forward and back
"""

import functools
import pathlib
import random
import runpy
import sys
import time

import jax
import jax.numpy as jnp

from mhc import axes

YEAR = 365 * 86400.0


def largest(folder: pathlib.Path) -> pathlib.Path:
  """Returns the largest file of a folder."""
  files = (path for path in folder.rglob('*') if path.is_file())
  return max(files, key=lambda path: (path.stat().st_size, str(path)))


def truncate(file: pathlib.Path, chance: random.Random):
  """Cuts off a part of the file."""
  data = file.read_bytes()
  file.write_bytes(data[: chance.randrange(len(data))])


def flip(file: pathlib.Path, chance: random.Random):
  """Flips eight bits of the file, anywhere."""
  data = bytearray(file.read_bytes())
  for place in {chance.randrange(8 * len(data)) for _ in range(8)}:
    data[place // 8] ^= 1 << place % 8
  file.write_bytes(data)


def fill(folder: pathlib.Path) -> pathlib.Path:
  """Fills the file system of the folder; returns the file that does."""
  filler = folder / 'filler'
  with filler.open('ab', buffering=0) as file:
    for size in (2**16, 2**10, 1):
      try:
        while file.write(b'\0' * size) == size:
          pass
      except OSError:
        continue
  return filler


def nan():
  """Replaces the loss and gradient of a batch that holds a byte 1 by NaN."""
  from mhc.parallel import replicated

  real = replicated.loss_and_grads

  def poisoned(p, params, router_bias, tokens):
    nats, grads, load = real(p, params, router_bias, tokens)
    found = jnp.sum(tokens == 1, dtype=jnp.int32)
    found = jax.lax.psum(found, (axes.DATA, axes.EXPERT))
    factor = jnp.where(found > 0, jnp.nan, 1.0)
    scaled = functools.partial(jnp.multiply, factor)
    return scaled(nats), jax.tree.map(scaled, grads), load

  replicated.loss_and_grads = poisoned


def clock():
  """Makes Python's `time.time` jump to another year every 2 s."""
  real, start = time.time, time.monotonic()

  def jumping():
    jumps = (0, 10, -20, 3, -1)
    turn = int((time.monotonic() - start) / 2)
    return real() + YEAR * jumps[turn % len(jumps)]

  time.time = jumping


if __name__ == '__main__':
  {'nan': nan, 'clock': clock}[sys.argv[1]]()
  sys.argv = sys.argv[2:]
  runpy.run_path(sys.argv[0], run_name='__main__')
