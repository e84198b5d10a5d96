"""What a run would be, without running it.

    python launch/aot.py --config=configs/paper_27b.py --count
    python launch/aot.py --config=configs/paper_3b.py --topology=v5p:2x2x1

The first prints parameters, FLOPs and activation bytes of a token as JSON. The
second compiles the training step for a TPU slice (or 'cpu') and prints its
memory, traffic and estimated time; minutes for the paper's models. Neither
allocates anything.
"""

import json

from absl import flags
import jax

import command_line
from mhc import config as config_lib
from mhc import counts
from mhc import plan as plan_lib

COUNT = flags.DEFINE_bool('count', False, 'Print the counts of --config.')
TOPOLOGY = flags.DEFINE_string(
  'topology', None, "Compile for a TPU slice such as v5p:2x2x1, or for 'cpu'."
)
JSON = flags.DEFINE_bool('json', False, 'Print the plan as JSON.')
command_line.define_config('tiny.py')


def main():
  if not COUNT.value and not TOPOLOGY.value:
    raise ValueError(
      'nothing to print: give --count or a --topology such as v5p:2x2x1'
    )
  config = command_line.config(config_lib.Config)
  if COUNT.value:
    print(json.dumps(counts.count(config.model, config.data.seq_len)))
  if TOPOLOGY.value:
    jax.config.update('jax_platforms', 'cpu')
    plan = plan_lib.make(config, TOPOLOGY.value)
    print(json.dumps(plan) if JSON.value else plan_lib.table(plan))


if __name__ == '__main__':
  command_line.run(main)
