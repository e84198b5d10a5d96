# %% [markdown]
# # The mHC kernels on this TPU
#
# The TPU kernels of `mhc.kernels` were written and tuned without a TPU, from
# the instructions that its compiler schedules. This notebook times them where
# it runs and puts the measured time next to the compiler's schedule and to the
# time that the bytes take. On a GPU it times what is there for GPUs. On a CPU
# it shows the predictions, and that the kernels compute what they should.

# %% install mhc-jax[train] pandas

# %%
from mhc.runtime import machine

machine.skip_search()
print(machine.describe())

# %% [markdown]
# ## What is predicted
#
# `advance` leaves one sub-layer and enters the next in one pass over n = 4
# streams of width C, bfloat16; `sinkhorn` projects one 4 x 4 matrix a token,
# float32. *HBM* is the time that their bytes take at the memory's published
# bandwidth, *schedule* what the compiler schedules for the core, both in
# nanoseconds a token. The larger one is the prediction. A schedule leaves out
# stalls that the compiler leaves to the hardware.
#
# HBM is computed here. The schedules of `advance` are those that `python
# launch/bench.py kernels` printed (README). `RECOMPUTE = True` compiles both
# operations again, in minutes, if libtpu is installed; without it the
# prediction of `sinkhorn` is its HBM time alone.

# %%
import pandas as pd

from mhc.kernels import chips
from mhc.planner import kernel_cost

C = 2560  # the width of the paper's 27B model
RECOMPUTE = False
SCHEDULE = {  # ns a token
  ('advance', 'forward', 'v5e'): 30.4,
  ('advance', 'backward', 'v5e'): 72.7,
  ('advance', 'forward', 'v5p'): 13.1,
  ('advance', 'backward', 'v5p'): 31.4,
  ('advance', 'forward', 'v6e'): 21.8,
  ('advance', 'backward', 'v6e'): 49.8,
  ('advance', 'forward', 'tpu7x'): 17.0,
  ('advance', 'backward', 'tpu7x'): 39.1,
}

# %%
import json
import math
import subprocess
import sys

import numpy as np

# In its own process: the compiler must be told before it is loaded.
CODE = """
import json, sys
from mhc.planner import bundles, kernel_cost
width, *generations = sys.argv[1:]
rows = kernel_cost.rows(
  ('sinkhorn', 'advance'), [int(width)], generations, bundles.folder()
)
for row in rows:
  print('row', json.dumps(row))
"""
if RECOMPUTE:
  command = [sys.executable, '-c', CODE, str(C), *chips.CHIPS]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  for line in done.stdout.splitlines():
    if line.startswith('row '):
      row = json.loads(line[4:])
      key = row['op'], row['direction'], row['generation']
      SCHEDULE[key] = row['schedule_ns_per_token']


# %%
def predictions(generation):
  """One row per operation and direction on a TPU, ns a token."""
  for operation in ('sinkhorn', 'advance'):
    for direction in ('forward', 'backward'):
      schedule = SCHEDULE.get((operation, direction, generation), math.nan)
      hbm = kernel_cost.hbm_ns_per_token(operation, direction, C, generation)
      yield {
        'TPU': generation,
        'op': operation,
        'direction': direction,
        'schedule': schedule,
        'HBM': hbm,
        'schedule / HBM': schedule / hbm,
        'predicted': np.nanmax([schedule, hbm]),
      }


KEY = ['op', 'direction']
rows = [row for name in chips.CHIPS for row in predictions(name)]
pd.DataFrame(rows).set_index(['TPU', *KEY]).round(2)

# %% [markdown]
# ## What is measured here
#
# Each operation is timed in turn with a copy of the streams, fifteen times; the
# median counts. Backward is the time of both directions less that of forward.
# *Of a copy* is the rate at which the least bytes that the operation must move
# are moved, over that of the copy: 1 would be perfect on any device. `kernel`
# is the Pallas kernel on a TPU and the Triton kernel on a GPU, `xla` is plain
# JAX, compiled.

# %%
import importlib.util

import jax

from mhc.planner import kernel_timing

PLATFORM = jax.default_backend()
TOKENS = {'advance': 32_768, 'sinkhorn': 2**21}
KERNELS = {'tpu': 'pallas', 'gpu': 'triton'}


def measure(operation, name, implementation):
  """Yields one row per direction."""
  forward, both = kernel_timing.rows(
    [operation], [C], TOKENS[operation], 4, implementation
  )
  copy = forward['gigabytes_per_second'] / forward['share_of_copy']
  done_ns = done_bytes = 0.0
  for direction, row in (('forward', forward), ('backward', both)):
    spent = row['ns_per_token'] - done_ns
    rate = (row['ideal_bytes'] - done_bytes) / spent  # bytes a ns: GB/s
    yield dict(zip((*KEY, 'by'), (operation, direction, name), strict=True)) | {
      'ns a token': spent,
      'of a copy': rate / copy,
    }
    done_ns, done_bytes = row['ns_per_token'], row['ideal_bytes']


measured = []
for name in ('kernel', 'xla') if PLATFORM in KERNELS else ():
  implementation = KERNELS[PLATFORM] if name == 'kernel' else 'xla'
  if implementation == 'triton' and not importlib.util.find_spec('jax_triton'):
    print("no Triton kernels here: pip install jax-triton 'triton<3.10'")
    continue
  for operation in TOKENS:
    try:
      measured += measure(operation, name, implementation)
    except Exception as error:  # on a device that no one has tried
      print(f'{operation}, {name}: {type(error).__name__}: {error}')
if PLATFORM not in KERNELS:
  print('Nothing can be measured here: the kernels are for TPUs, not for CPUs.')

# %%
kind = jax.devices()[0].device_kind
here = [name for name, chip in chips.CHIPS.items() if chip.kind == kind]
if measured:
  table = pd.DataFrame(measured).pivot(index=KEY, columns='by')
  table.columns = [f'{by}, {what}' for what, by in table.columns]
  if here:
    table = table.join(pd.DataFrame(predictions(here[0])).set_index(KEY))
else:
  columns = ['kernel, ns a token', 'xla, ns a token', 'kernel, of a copy']
  table = pd.DataFrame(predictions('v5e')).set_index(KEY)
  table[columns] = '-'  # how it would look on a v5e
table.round(2)

# %% [markdown]
# ## Do the kernels compute the right thing?
#
# Each operation and its gradient, next to plain JAX in float32 with random
# cotangents. Without a TPU the Pallas kernels are interpreted, on few tokens.

# %%
import jax.numpy as jnp


def results(operation, implementation, operands):
  """The operation's outputs and its gradients, as one list."""
  out, pull_back = jax.vjp(
    lambda *given: kernel_cost.run(operation, implementation, *given), *operands
  )
  keys = iter(jax.random.split(jax.random.key(1), 8))
  cotangent = jax.tree.map(
    lambda o: jax.random.normal(next(keys), o.shape, o.dtype), out
  )
  return jax.tree.leaves((out, pull_back(cotangent)))


implementation = KERNELS['tpu' if PLATFORM == 'cpu' else PLATFORM]
for operation in TOKENS:
  shapes = kernel_cost.case(operation, 128, 37, 4, jnp.float32)
  keys = jax.random.split(jax.random.key(0), len(shapes))
  operands = [
    0.3 * jax.random.normal(key, shape.shape, shape.dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]
  try:
    found, right = (
      jax.jit(results, static_argnums=(0, 1))(operation, which, operands)
      for which in (implementation, 'xla')
    )
  except NotImplementedError as reason:
    print(f'{operation}: {reason}')
    continue
  errors = [
    float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    for a, b in zip(found, right, strict=True)
  ]
  print(f'{operation}: largest relative difference {max(errors):.0e}')

# %% [markdown]
# ## To report a measurement
#
# No one has published times of mHC kernels on a TPU. If this ran on one, the
# text below is what an issue needs.

# %%
print(machine.describe())
print(f'C = {C}, n = 4, tokens {TOKENS}')
print(table.round(3).to_csv())
