"""Memory, communication and time of a training step on absent machines.

The step is compiled ahead of time from abstract shapes, by the real compiler of
the target; nothing is allocated and nothing runs. A topology is 'cpu', the
devices of this process, a TPU slice such as 'v5p:2x2x1' or 'v6e:4x4', or the
GPUs of one machine such as 'h100:8'. Only TPU compilers estimate time, so that
for others a plan is about memory.

`cost` prices the compute of the compiled step, `collectives` its communication.
In a pipeline the devices wait for each other, so that a tick lasts as long as
its longest stage; `ticks.branch_frequencies` gives the fraction of ticks that
have one.
"""

from concurrent import futures
import math
import re
import time
from typing import Any

import jax

from mhc import config as config_lib
from mhc.axes import DATA
from mhc.config import dicts
from mhc.kernels import chips
from mhc.model import expert_parallel
from mhc.model import parameters
from mhc.parallel import counts
from mhc.parallel import fsdp
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.pipeline import bubble as bubble_lib
from mhc.pipeline import table as table_lib
from mhc.pipeline import ticks
from mhc.planner import breakdown
from mhc.planner import collectives
from mhc.planner import cost
from mhc.planner import gpu_targets
from mhc.planner import hlo
from mhc.planner import kernel_bundles
from mhc.planner import targets
from mhc.training import step as step_lib

Plan = dict[str, Any]
# The figures that only the compiler schedule of a TPU gives; else None.
SCHEDULED = (
  'bytes_moved',
  'compute_seconds',
  'collectives',
  'exposed_comm_fraction',
  'step_seconds',
  'step_seconds_bounds',
  'tokens_per_second',
  'mfu',
  'mfu_compiler',
  'breakdown',
  'bubble_seconds',
  'padding_seconds',
  'recompute_seconds',
)


def plan_step(config: config_lib.Config, topology: str) -> Plan:
  """Compiles the update for a topology and describes it.

  Returns:
    topology, devices, mesh (sizes of the axes), kind, tokens_per_step.
    total_params, flops_per_token: from `counts`.
    predicted_bytes: of activations per device, by kind, from `memory`.
    fits: whether the compiler placed the step in a device's memory; for GPUs
      whether it has bytes_per_device.
    hbm_bytes: of a device; None on CPUs.
    bytes_per_device: peak memory; if the step does not fit, the compiler's
      estimate of the memory required.
    by_category: bytes_per_device, split up; see `categories`.
    microbatches; bubble: idle fraction of the pipeline schedule's ticks, see
      `bubble.of_mesh`.
    compile_seconds: on this machine.
    bytes_moved, compute_seconds: of the compiler schedule, loops in full, by
      `cost`; here and below for TPUs only.
    collectives: by axes of the mesh and kind: count, bytes, seconds (on the
      links) and exposed seconds, per step.
    exposed_comm_fraction: of step_seconds.
    step_seconds: compute_seconds and exposed communication.
    step_seconds_bounds: the same with the low and the high of `cost`.
    tokens_per_second, mfu: derived from step_seconds.
    mfu_compiler: by the compiler's own cycles, where it has any.
    breakdown: of step_seconds by part, see `breakdown.Share`.
    bubble_seconds, padding_seconds, recompute_seconds: across the parts.

  Raises:
    ValueError: an unknown topology, or a batch that does not divide over it.
  """
  mesh = mesh_lib.make_mesh(config.mesh, config.data, targets.devices(topology))
  step = step_lib.Step(Placement(config, mesh))
  name = topology.partition(':')[0]
  chip, gpu = chips.CHIPS.get(name), gpu_targets.GPUS.get(name)
  start = time.perf_counter()
  traced = step.trace()
  bundles = _counted(config, topology, traced) if chip else None
  compiled, needed = _compile(step, traced)
  compile_seconds = time.perf_counter() - start
  hbm = (chip or gpu).hbm if chip or gpu else None
  number = step.placement.num_microbatches
  schedule = None
  if config.mesh.pipe > 1:
    schedule = table_lib.for_mesh(config.mesh, number)
  plan = {
    'topology': topology,
    **_sizes(config, mesh),
    'fits': compiled is not None,
    'hbm_bytes': hbm,
    'bytes_per_device': needed,
    'by_category': None,
    'microbatches': number,
    'bubble': bubble_lib.of_mesh(config.mesh, number),
    'compile_seconds': compile_seconds,
    **dict.fromkeys(SCHEDULED),
  }
  if compiled is not None:
    peak = compiled.memory_analysis().peak_memory_in_bytes
    plan |= {
      'bytes_per_device': peak,
      'by_category': categories(step, peak),
    }
    if gpu:  # whose compiler does not check the device's memory
      plan['fits'] = plan['bytes_per_device'] <= hbm
    if chip:
      plan |= _scheduled(step, compiled, schedule, chip, plan, bundles())
  return plan


def _counted(config, topology, traced):
  """A function that waits for the bundles of the kernels of a traced step."""
  if next(kernel_bundles.kernels(traced.jaxpr.jaxpr), None) is None:
    return dict
  pool = futures.ThreadPoolExecutor(1)
  counting = pool.submit(kernel_bundles.of_step, config, topology)
  pool.shutdown(wait=False)
  return counting.result


def _compile(step, traced):
  """(program, nan); if it does not fit, (None, bytes that it requires)."""
  lowered = traced.lower()
  try:
    options = step_lib.compiler_options(step.placement)
    return lowered.compile(options), math.nan
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, _needed(str(error))


def _sizes(config, mesh):
  """The figures of a plan that follow from the config and the mesh."""
  count = counts.count(config.model, config.data.seq_len)
  return {
    'devices': mesh.size,
    'mesh': dict(mesh.shape),
    'kind': config.model.connection.kind,
    'tokens_per_step': config.tokens_per_step,
    'total_params': count['total_params'],
    'flops_per_token': count['flops_per_token'],
    'predicted_bytes': memory.predicted(config, mesh.size),
  }


def overheads(
  config: config_lib.Config, topology: str, plan: Plan, names: tuple[str, ...]
) -> dict[str, float]:
  """Relative overheads of a step of `plan` over steps of other programs.

  Args:
    config, topology, plan: of `plan_step`.
    names: 'residual', the plain residual on the same mesh; 'xla', the same
      without kernels.
  """
  other = {
    'residual': dict(kind='residual', collapse='mean'),
    'xla': dict(implementation='xla'),
  }
  return {
    f'overhead_vs_{name}': plan['step_seconds']
    / plan_step(
      dicts.replace(config, model=dict(connection=other[name])), topology
    )['step_seconds']
    - 1
    for name in names
  }


def categories(step: step_lib.Step, total: int) -> dict[str, int]:
  """Splits a device's `total` bytes; all categories but the last are counted.

  parameters, optimiser: the device's shards.
  gathered_params, gradients: gathered and summed up over a step, on a device of
    a pipeline; without a pipeline they are among the temporaries.
  stages: the buffer slots of the pipeline schedule.
  temporaries: the remainder.
  """

  def shard_bytes(tree):
    return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )

  state, config = step.abstract_state, step.placement.config
  found = {
    'parameters': shard_bytes(state.params),
    'optimiser': shard_bytes((state.opt_state, state.router_bias, state.step)),
  }
  if config.mesh.pipe > 1:
    gathered = gradients = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
      size = math.prod(leaf.sharding.shard_shape(leaf.shape))
      if DATA in leaf.sharding.spec:
        size *= step.mesh.shape[DATA]
      names = parameters.path_names(path)
      gathered += size * fsdp.used_dtype(names, config.model.dtype).itemsize
      gradients += 4 * size
    held = memory.predicted(config, step.mesh.size)
    stages = held['stages'] + held.get('kept', 0)
    found |= {
      'gathered_params': gathered,
      'gradients': gradients,
      'stages': stages,
    }
  return found | {'temporaries': max(0, total - sum(found.values()))}


def _scheduled(step, compiled, schedule, chip, plan, bundles):
  """The figures of a plan that follow from the compiler schedule."""
  config, mesh = step.placement.config, step.mesh
  frequencies, useful = {expert_parallel.OVERFLOW: 0.0}, {}
  if schedule:
    frequencies |= ticks.branch_frequencies(schedule)
    useful = ticks.device_frequencies(schedule)
  module = hlo.parse(compiled.as_text(), frequencies)
  live = 1 / config.model.moe.buffer_factor if config.mesh.expert > 1 else 1.0
  costs = cost.Costs(module, chip, cost.Assumed(bundles, min(1.0, live)))
  total = costs.entry
  found = collectives.collectives(costs, mesh)
  exposed = collectives.exposed_seconds(found)
  seconds = total.middle + exposed
  rate = config.tokens_per_step / seconds
  padded = float((step.placement.layout.depth_index < 0).mean())
  shares = breakdown.breakdown(costs, chip, useful, padded)
  peak = plan['flops_per_token'] * config.tokens_per_step
  peak /= chip.flops * mesh.size
  return {
    'bytes_moved': total.hbm_bytes,
    'compute_seconds': total.middle,
    'collectives': {
      ' x '.join(axes) or 'none': {
        kind: total._asdict() for kind, total in kinds.items()
      }
      for axes, kinds in collectives.by_axis(found).items()
    },
    'exposed_comm_fraction': exposed / seconds,
    'step_seconds': seconds,
    'step_seconds_bounds': (total.low + exposed, total.high + exposed),
    'tokens_per_second': rate,
    'mfu': peak / seconds,
    'mfu_compiler': peak / (total.compiler + exposed),
    'breakdown': {name: s._asdict() for name, s in shares.parts.items()}
    | {'exposed_communication': breakdown.Share(exposed)._asdict()},
    'bubble_seconds': shares.bubble_seconds,
    'padding_seconds': shares.padding_seconds,
    'recompute_seconds': shares.recompute_seconds,
  }


def _needed(message):
  """Bytes required, by the compiler's error message; nan if not given."""
  found = re.search(r'(?:Used |temporaries \()([\d.]+)([KMG])\b', message)
  if not found:
    return math.nan
  return float(found.group(1)) * 2.0 ** (10 * ('KMG'.index(found.group(2)) + 1))
