"""Counts, compiles and plans a run, without running it.

    python launch/aot.py --config=configs/paper_27b.py --count
    python launch/aot.py --config=configs/paper_3b.py --topology=v5p:2x2x1
    python launch/aot.py --config=configs/paper_3b.py --topology=h100:8
    python launch/aot.py --config=configs/paper_27b.py --topology=v5p:8x8x8 \
        --suggest
    python launch/aot.py --config.mesh.schedule=dualpipev --config.mesh.pipe=4 \
        --draw_schedule=schedule.png --microbatches=16

--count prints parameters, and FLOPs and activation bytes per token, as JSON.
--topology compiles the training step for a TPU slice (or 'cpu') and prints
whether it fits, its communication, its time and where that goes; minutes per
program for the paper's models. For the GPUs of a
machine (h100, h200, b200; requires pip install 'jax[cuda13]', no GPU) it prints
whether it fits.
--suggest instead searches meshes by formulas, in seconds. --draw_schedule draws
the pipeline schedule, --draw_step the step's parts. Nothing is allocated.
"""

import json
import math

from absl import flags
import jax

from mhc import config as config_lib
from mhc.kernels import chips
from mhc.parallel import counts
from mhc.pipeline import bubble
from mhc.pipeline import draw
from mhc.pipeline import table as table_lib
from mhc.planner import draw as draw_step
from mhc.planner import plan as plan_lib
from mhc.planner import search
from mhc.planner import slices
from mhc.planner import table as plan_table
from mhc.planner import targets
from mhc.runtime import cli
from mhc.runtime import console

COUNT = flags.DEFINE_bool('count', False, 'Print the counts of --config.')
TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  "Compile for a TPU slice such as v5p:2x2x1 (or Cloud's v5p-8), GPUs such as "
  "h100:8, or 'cpu'.",
)
AGAINST = flags.DEFINE_list(
  'against',
  [],
  "Programs to compare the whole step with: 'residual' and 'xla' (without "
  'kernels), one more compilation each. The compiler may arrange two programs '
  'so differently that their difference says little of the connections, whose '
  'own seconds every plan has.',
)
SUGGEST = flags.DEFINE_bool(
  'suggest', False, 'Print the fastest meshes for --topology, by formulas.'
)
DRAW = flags.DEFINE_string(
  'draw_schedule',
  None,
  'PNG file for a drawing of the pipeline schedule of --config.mesh.',
)
DRAW_STEP = flags.DEFINE_string(
  'draw_step',
  None,
  'PNG or PDF file for a bar of the parts of the step on --topology.',
)
MICROBATCHES = flags.DEFINE_integer(
  'microbatches',
  None,
  'Number of microbatches in --draw_schedule; by default 2 * chunks * pipe.',
)
JSON = flags.DEFINE_bool('json', False, 'Print plans as JSON.')
cli.define_config('tiny')


def main():
  config = cli.config(config_lib.Config)
  if not (COUNT.value or TOPOLOGY.value or DRAW.value):
    raise ValueError(
      'nothing to print: give --count, --draw_schedule or a --topology such as '
      'v5p:2x2x1'
    )
  for flag in (SUGGEST, DRAW_STEP):
    if flag.value and not TOPOLOGY.value:
      raise ValueError(f'--{flag.name} requires a --topology such as v5p:8x8x8')
  unknown = set(AGAINST.value) - {'residual', 'xla', ''}
  if unknown:
    raise ValueError(f"--against={unknown.pop()!r} must be 'residual' or 'xla'")
  if COUNT.value:
    print(json.dumps(counts.count(config.model, config.data.seq_len)))
  if DRAW.value:
    _draw(config.mesh)
  if TOPOLOGY.value:
    jax.config.update('jax_platforms', 'cpu')
    topology = slices.topology(TOPOLOGY.value)
    if topology != TOPOLOGY.value:
      console.print_line(f'{TOPOLOGY.value} is {topology}')
    (_suggest if SUGGEST.value else _plan)(config, topology)


def _draw(mesh):
  pipe = mesh.pipe
  number = MICROBATCHES.value or 2 * mesh.chunks * pipe
  drawn = table_lib.for_mesh(mesh, number)
  draw.save(drawn, DRAW.value)
  print(
    f'{mesh.schedule}, {pipe} devices, {number} microbatches: '
    f'{drawn.num_ticks} ticks, bubble {bubble.fraction(drawn):.1%}, '
    f'{table_lib.peak_states(drawn)} states kept; drawn in {DRAW.value}'
  )


def _plan(config, topology):
  plan = plan_lib.plan_step(config, topology)
  against = [name for name in AGAINST.value if name]
  if config.model.connection.kind == 'residual':
    against = []
  if plan['step_seconds'] is not None:
    plan |= plan_lib.overheads(config, topology, plan, tuple(against))
  if DRAW_STEP.value:
    draw_step.save(plan, DRAW_STEP.value)
  if JSON.value:
    plan = {
      key: None if isinstance(value, float) and math.isnan(value) else value
      for key, value in plan.items()
    }
  print(json.dumps(plan) if JSON.value else plan_table.table(plan))


def _suggest(config, topology):
  number = len(targets.devices(topology))
  found = search.suggest(config, topology, number)
  if JSON.value:
    print(json.dumps([one._asdict() for one in found]))
    return
  hbm = chips.CHIPS[topology.partition(':')[0]].hbm
  print(search.table(found, config, number, hbm))


if __name__ == '__main__':
  cli.run(main, computes=False)
