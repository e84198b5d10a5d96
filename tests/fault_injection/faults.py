"""What can go wrong, made to go wrong: for the trials of harness.py.

To files (`truncate`, `flip`, `fill`), and to a process, which is started as

    python faults.py nan launch/train.py --workdir=...

    nan      the loss and the gradient of a batch that holds a byte 1 are NaN
    clock    the time of day jumps by years, forth and back
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
  """The file in it with the most bytes."""
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
  """Takes all room that the file system of the folder has; returns the file."""
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
  """See above."""
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
  """See above: what Python's `time.time` says, another year every 2 s."""
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
