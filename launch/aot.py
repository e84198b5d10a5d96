"""What a run would be, without running it.

    python launch/aot.py --config=configs/paper_27b.py --count

prints total, active and connection parameters and the training FLOPs of a token
as JSON; nothing is allocated.
"""

import json

from absl import flags

import command_line
from mhc import config as config_lib
from mhc import counts

COUNT = flags.DEFINE_bool('count', False, 'Print the counts of --config.')
command_line.define_config('tiny.py')


def main():
  if not COUNT.value:
    raise ValueError('nothing to print: give --count')
  config = command_line.config(config_lib.Config)
  print(json.dumps(counts.count(config.model, config.data.seq_len)))


if __name__ == '__main__':
  command_line.run(main)
