"""What a training step is on machines that need not be here.

The step is compiled ahead of time from abstract shapes, by the real compiler of
the target; nothing is allocated and nothing runs. A topology is 'cpu', the
devices of this process, or a TPU slice such as 'v5p:2x2x1' or 'v6e:4x4'.
"""

import os
import time
from typing import Any

import jax
from jax.experimental import topologies

from mhc import chips
from mhc import config as config_lib
from mhc import counts
from mhc import hlo
from mhc import memory
from mhc import sharding
from mhc import step


def devices(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ValueError: libtpu is not installed or does not know the topology.
  """
  if topology == 'cpu':
    return jax.devices('cpu')
  # What libtpu asks a TPU host for at start, and one of its kind at a time.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    return topologies.get_topology_desc(topology, 'tpu').devices
  except Exception as error:  # of several kinds, jaxlib's own among them
    raise ValueError(
      f"topology={topology!r} cannot be compiled for: give 'cpu' or a TPU "
      "slice such as 'v5p:2x2x1' or 'v6e:4x4', and install its compiler with "
      f"pip install 'jax[tpu]' ({str(error).splitlines()[0]})"
    ) from None


def make(config: config_lib.Config, topology: str) -> dict[str, Any]:
  """Compiles the update for a topology.

  Returns:
    topology, devices, tokens_per_step.
    total_params, flops_per_token: as `counts` has them.
    predicted_bytes: of activations a device, by kind, as `memory` has them.
    argument_bytes, temp_bytes, peak_bytes: a device, by XLA.
    bytes_accessed, optimal_seconds: XLA's cost analysis of one step on one
      device, which counts the body of every loop once; None where it has none.
    bytes_moved, scheduled_seconds: of the compiler's schedule, loops in full;
      None but for the TPUs of `chips`. The seconds are the compiler's cycles,
      and for kernels (ragged matrix products) their roofline.
    compile_seconds: on this machine.

  Raises:
    ValueError: an unknown topology, a batch that it cannot share, or a step
      that does not fit its memory.
  """
  mesh = sharding.make_mesh(config.mesh, config.data, devices(topology))
  functions = step.functions(config, mesh)
  start = time.perf_counter()
  lowered = functions.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise ValueError(
      f'the step does not fit a device of {topology}: take fewer rows at a '
      'time (data.microbatch_size), more devices or another model.recompute '
      f'({str(error).splitlines()[0]})'
    ) from None
  seconds = time.perf_counter() - start
  analysis, xla = compiled.memory_analysis(), compiled.cost_analysis() or {}
  moved = scheduled = None
  generation = topology.partition(':')[0]
  if generation in chips.CHIPS:
    moved, scheduled = _schedule(compiled, chips.CHIPS[generation])
  count = counts.count(config.model, config.data.seq_len)
  return {
    'topology': topology,
    'devices': mesh.size,
    'total_params': count['total_params'],
    'flops_per_token': count['flops_per_token'],
    'tokens_per_step': config.tokens_per_step,
    'predicted_bytes': memory.predicted(config, mesh.size),
    'argument_bytes': analysis.argument_size_in_bytes,
    'temp_bytes': analysis.temp_size_in_bytes,
    'peak_bytes': analysis.peak_memory_in_bytes,
    'bytes_accessed': xla.get('bytes accessed'),
    'optimal_seconds': xla.get('optimal_seconds'),
    'bytes_moved': moved,
    'scheduled_seconds': scheduled,
    'compile_seconds': seconds,
  }


def _schedule(compiled, chip):
  module = hlo.parse(compiled.as_text())
  cost = hlo.cost(module, (chip.flops, chip.bandwidth))
  return cost.bytes, cost.cycles / chip.clock + cost.kernel_seconds


def table(plan: dict[str, Any]) -> str:
  """Markdown; says of each figure where it comes from."""
  rows = []

  def row(name, value, source):
    rows.append(f'| {name} | {value} | {source} |')

  row('devices', f'{plan["devices"]}', plan['topology'])
  row('parameters', f'{plan["total_params"]:,}', 'counted')
  row('training FLOPs a token', f'{plan["flops_per_token"]:.3g}', 'counted')
  row('tokens a step', f'{plan["tokens_per_step"]:,}', 'config')
  for kind, size in plan['predicted_bytes'].items():
    row(f'activations: {kind}', _size(size), 'formula')
  for kind in ('argument', 'temp', 'peak'):
    row(f'{kind} bytes a device', _size(plan[f'{kind}_bytes']), 'compiled')

  def either(value, form):
    return '-' if value is None else form.format(value)

  once, full = "compiler's cost, loop bodies once", 'schedule, loops in full'
  row('bytes accessed', either(plan['bytes_accessed'], '{:.3g}'), once)
  row('seconds a step', either(plan['optimal_seconds'], '{:.3g}'), once)
  row('bytes moved', either(plan['bytes_moved'], '{:.3g}'), full)
  row('seconds a step', either(plan['scheduled_seconds'], '{:.3g}'), full)
  if plan['scheduled_seconds']:
    rate = plan['tokens_per_step'] / plan['scheduled_seconds']
    row('tokens a second', f'{rate:,.0f}', 'from the line above')
  row('seconds to compile', f'{plan["compile_seconds"]:.0f}', 'measured here')
  return '\n'.join(['| | | from |', '|---|---:|---|', *rows])


def _size(value):
  return (
    f'{value / 2**30:.2f} GiB' if value >= 2**30 else f'{value / 2**20:.2f} MiB'
  )
