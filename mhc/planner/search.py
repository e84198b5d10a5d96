r"""Searches meshes, pipeline schedules and microbatches, without compiling.

All that divide are ranked by an estimated step time,

    (compute + experts) / (1 - bubble) + matrices,

with N devices of peak F, links that together carry W bytes a second one way,
and T tokens a step:

    compute   flops_per_token T / (N F efficiency), a third more for every
              forward pass that is computed a second time, by model.recompute or
              in a pipeline by mesh.keep='inputs';
              1 / efficiency = PRODUCTS + MOVED F / (B C) with B of the memory
              and C the model's width, MOVED twice as large in a pipeline
    experts   per layer two passes, three where the forward pass is repeated:
              tokens are sent to their experts and back, `expert_parallel`; by
              all_gather half of it overlapped, all of it with two sub-batches;
              by all_to_all over one link, nothing overlapped, half of it with
              two sub-batches
    matrices  gathered in the activations' dtype and gradients summed in
              float32, once a step in a pipeline; else with every microbatch,
              gathered twice, over half of the links and WAITED

A device's memory holds its shards of parameters and optimiser, gathered
matrices and gradient sums (of a pipeline's stages, else of the blocks at
hand), and activations by `memory.predicted`, those of a recompute block twice,
with their gradients. It suffices if that is at most FULL of the HBM. These are
rough: the seconds of plans that were compiled are off by up to ERROR, their
bytes are up to an eighth more than said, in a pipeline that computes stages
again a third. Compile the result.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple, get_args

from mhc import config as config_lib
from mhc.config import dicts
from mhc.kernels import chips
from mhc.model import expert_parallel
from mhc.model import recompute
from mhc.parallel import counts
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.pipeline import bubble as bubble_lib

# Seconds of a FLOP over those of the peak; bytes that go along with C FLOPs,
# without a pipeline and in one. From compiled plans (docs/planner.md).
PRODUCTS, MOVED, MOVED_IN_A_PIPELINE = 1.05, 11, 22
FULL = 0.92
WAITED = 1.5  # over half of the links, a quarter hidden
LINKS = 4  # of a chip; an all_to_all is as slow as if it had one
# Largest error of the formula over the steps that were compiled.
ERROR = 0.1
# Policies that are suggested; the others keep more, or save little.
AGAIN = ('mhc', 'mhc+experts', 'full')


class Suggestion(NamedTuple):
  """Settings of a run, and their estimated cost."""

  settings: dict[str, Any]  # overrides of the config, by dotted name
  seconds: float  # per step
  bytes: float  # per device
  bubble: float

  def flags(self) -> str:
    return ' '.join(f'--config.{k}={v}' for k, v in self.settings.items())


def suggest(
  config: config_lib.Config, topology: str, num_devices: int, number: int = 5
) -> list[Suggestion]:
  """Returns the `number` fastest candidates that fit, by estimated seconds.

  Raises:
    ValueError: the TPU generation is unknown, the run divides over no mesh, or
      nothing fits.
  """
  chip = _chip(topology)
  count = counts.count(config.model, config.data.seq_len)
  routed = _routed(config.model)
  found = [
    _estimate(candidate, settings, num_devices, chip, count, routed)
    for candidate, settings in _candidates(config, num_devices)
  ]
  if not found:
    raise ValueError(
      f'data.batch_size={config.data.batch_size} and '
      f'model.num_blocks={config.model.num_blocks} divide over no mesh of '
      f'{num_devices} devices: change one of the three'
    )
  fitting = [one for one in found if one.bytes <= FULL * chip.hbm]
  if not fitting:
    least = min(found, key=lambda one: one.bytes)
    raise ValueError(
      f'nothing fits {num_devices} devices of {topology}: the smallest, '
      f'{least.flags()}, requires {least.bytes / 2**30:.0f} GiB of '
      f'{chip.hbm / 2**30:.0f} per device; use more devices'
    )
  fitting.sort(key=lambda one: (one.seconds, one.bytes))
  best = {}  # per mesh
  for one in fitting:
    best.setdefault(
      (one.settings['mesh.pipe'], one.settings['mesh.expert']), one
    )
  return [*best.values()][:number]


def estimate(
  config: config_lib.Config, topology: str, num_devices: int
) -> Suggestion:
  """The formulas for a config as it is.

  Raises:
    ValueError: the TPU generation is unknown.
  """
  count = counts.count(config.model, config.data.seq_len)
  return _estimate(
    config, {}, num_devices, _chip(topology), count, _routed(config.model)
  )


def _chip(topology) -> chips.Chip:
  generation = topology.partition(':')[0]
  if generation not in chips.CHIPS:
    raise ValueError(
      f'topology={topology!r} names an unknown TPU generation: choose from '
      f'{", ".join(chips.CHIPS)}'
    )
  return chips.CHIPS[generation]


def _candidates(
  config, num_devices
) -> Iterator[tuple[config_lib.Config, dict]]:
  """Yields every valid config, with the overrides that make it."""
  powers = [2**i for i in range(num_devices.bit_length())]
  rows = config.data.batch_size // num_devices
  microbatches = {1, 2, 4, 8, *(d for d in range(1, rows + 1) if rows % d == 0)}
  streams = config.model.connection.streams
  for pipe, expert, microbatch, chunks, schedule, every, keep, again in product(
    powers,
    powers,
    sorted(microbatches),
    (2, 3, 4),
    get_args(config_lib.Schedule),
    sorted(
      {2, 4, recompute.optimal_interval(2 * config.model.num_blocks, streams)}
    ),
    get_args(config_lib.Keep),
    sorted(
      {config.model.recompute, *AGAIN}, key=get_args(recompute.Policy).index
    ),
  ):
    # Settings without effect are tried once.
    if chunks > 2 and (pipe == 1 or schedule != 'interleaved'):
      continue
    if again == 'mhc+experts' and not config.model.moe.num_experts:
      continue
    if num_devices % (pipe * expert):
      continue
    if pipe == 1 and (schedule != 'interleaved' or keep != 'inputs'):
      continue
    settings = {
      'mesh.pipe': pipe,
      'mesh.expert': expert,
      'mesh.num_sub_batches': 2 if expert > 1 and microbatch % 2 == 0 else 1,
      'mesh.keep': keep,
      'data.microbatch_size': microbatch,
      'model.recompute': again,
      'model.recompute_every': every,
    }
    if pipe > 1:
      vocab = config.model.vocab_size % pipe == 0
      settings |= {
        'mesh.schedule': schedule,
        'mesh.chunks': chunks,
        'mesh.head': 'vocab' if vocab else 'last',
      }
    try:
      candidate = dicts.replace(config, **_nested(settings))
      mesh_lib.num_microbatches(
        candidate.mesh, candidate.data, num_devices // pipe
      )
      if candidate.data.batch_size % (num_devices // pipe):
        continue
      memory.predicted(candidate, num_devices)
    except ValueError:
      continue
    yield candidate, settings


def _estimate(config, settings, num_devices, chip, count, routed):
  """Evaluates the formulas at the top of the file."""
  model, mesh, data = config.model, config.mesh, config.data
  pipe, expert = mesh.pipe, mesh.expert
  split = num_devices // (pipe * expert)  # over `data`
  wire = 2 if model.dtype == 'bfloat16' else 4
  links = chip.ici_bandwidth * chip.ici_links
  number = mesh_lib.num_microbatches(mesh, data, num_devices // pipe)

  gathered = routed / (pipe * expert) + (count['total_params'] - routed) / pipe
  shards = 12 * gathered / split
  buffers = (
    (wire + 4) * gathered
    if pipe > 1
    else _of_blocks_at_hand(model, gathered, wire) + 4 * gathered / split
  )
  activations = sum(memory.predicted(config, num_devices).values())
  anew = dicts.replace(config, model=dict(recompute='full'))
  activations += memory.predicted(anew, num_devices)['inner']

  again = pipe > 1 and mesh.keep == 'inputs'
  in_blocks = _computed_again(model, count, routed)
  passes = 1 + (again + in_blocks) / 3
  tokens = config.tokens_per_step
  compute = count['flops_per_token'] * tokens * passes
  compute /= efficiency(chip, model.dim, pipe > 1) * chip.flops * num_devices
  bubble = bubble_lib.of_mesh(mesh, number)

  experts = 0.0
  if expert > 1:
    layers = model.num_moe_blocks / pipe
    sent = _sent(model.moe, mesh) * 2 * tokens * pipe / num_devices
    ways = 2 + again + (in_blocks > 0)
    experts = sent * model.dim * wire * layers * ways / links
  matrices = 0.0
  if split > 1:
    # With every microbatch twice, forward and backward, but behind products.
    each = wire + 4 if pipe > 1 else number * WAITED * (2 * wire + 4)
    matrices = each * gathered / links
  return Suggestion(
    settings,
    (compute + experts) / (1 - bubble) + matrices,
    shards + buffers + activations,
    bubble,
  )


def efficiency(chip: chips.Chip, dim: int, in_a_pipeline: bool) -> float:
  """Fraction of a chip's peak that a step is expected to reach."""
  moved = MOVED_IN_A_PIPELINE if in_a_pipeline else MOVED
  return 1 / (PRODUCTS + moved / dim * chip.flops / chip.bandwidth)


def _sent(moe, mesh):
  """Rows that a token is sent as, by all links and without an overlap."""
  size, split = mesh.expert, mesh.num_sub_batches > 1
  if expert_parallel.transport(moe, size) == 'all_gather':
    return 0.0 if split else 0.5 * (size - 1)
  rows = moe.experts_per_token * (size - 1) / size
  return (0.5 if split else 1.0) * LINKS * rows


def _computed_again(model, count, routed):
  """The part of a forward pass that model.recompute computes twice."""
  match model.recompute:
    case 'none' | 'mhc':
      return 0.0
    case 'mhc+block' | 'full':
      return 1.0
  # Two of three products of each expert that a token visits.
  active = routed * model.moe.experts_per_token / model.moe.num_experts
  return 2 / 3 * 6 * active / count['flops_per_token']


def _of_blocks_at_hand(model, gathered, wire):
  """Bytes of matrices that are gathered when the network comes to them.

  Those of a recompute block and the next, a block's gradients; and both of the
  vocabulary.
  """
  around = (1 if model.tied_embeddings else 2) * model.vocab_size * model.dim
  block = (gathered - around) / model.num_blocks
  blocks = recompute.recompute_interval(model) // 2 + 1
  return (wire * (blocks + 1) + 4) * block + 2 * wire * around


def _routed(model):
  """Number of parameters of the routed experts."""
  moe = model.moe
  return 3 * model.num_moe_blocks * moe.num_experts * moe.expert_dim * model.dim


def _nested(settings):
  tree: dict[str, Any] = {}
  for name, value in settings.items():
    *groups, leaf = name.split('.')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[leaf] = value
  return tree


def table(
  suggestions: list[Suggestion],
  config: config_lib.Config,
  num_devices: int,
  hbm: int,
) -> str:
  """Formats suggestions as a Markdown table, with the cost of the whole run."""
  rows = [
    f'| {one.seconds:.3g} s | {config.tokens_per_step / one.seconds:,.0f} '
    f'| {run / 24:.3g} days, {run * num_devices:,.0f} device-hours '
    f'| {one.bytes / 2**30:.0f} of {hbm / 2**30:.0f} GiB '
    f'| {one.bubble:.0%} | `{one.flags()}` |'
    for one in suggestions
    for run in [config.num_steps * one.seconds / 3600]
  ]
  return '\n'.join(
    [
      f'| step (formula, within {ERROR:.0%}) | tokens a second '
      f'| {config.num_steps:,} steps | bytes a device (formula) | bubble '
      '| settings |',
      '|---:|---:|---:|---:|---:|---|',
      *rows,
    ]
  )
