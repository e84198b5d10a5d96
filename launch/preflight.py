"""Looks at a run on a pod before a chip is asked for; a second, no accelerator.

    python launch/preflight.py --topology=v5p-1024 \
      --config=configs/paper_27b.py --config.data.path=/mnt/data/tokens

The slice is named as Cloud does, or by its sides (v5p:8x8x8). The other flags
are those of launch/train.py; launch/tpu_pod.sh passes them on. Mesh, batch,
memory, text, vocabulary and disk are looked at as far as they can be seen from
here; time and memory are by formula, `launch/aot.py` compiles. What cannot work
ends with status 2.
"""

import sys

from absl import flags

from mhc import config as config_lib
from mhc.planner import preflight
from mhc.runtime import cli

TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'A slice such as v5p-1024, or h100:8.', required=True
)
WORKDIR = flags.DEFINE_string('workdir', '', 'Folder of the run.')
cli.define_config('tiny')
cli.define_processes()
cli.define_end()
cli.define_profile()


def main():
  config = cli.config(config_lib.Config)
  found = list(preflight.look(config, TOPOLOGY.value, WORKDIR.value))
  for check in found:
    mark = 'CANNOT WORK' if check.problem else 'ok'
    print(f'{check.what:12} {mark:12} {check.found}')
  sys.exit(2 if any(check.problem for check in found) else 0)


if __name__ == '__main__':
  cli.run(main, computes=False)
