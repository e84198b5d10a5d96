"""Trains one model: `python launch/train.py --workdir=runs/tiny`.

Several processes train one together: each gets the same flags, and with
--distributed finds the others on its cluster. launch/local_multiprocess.py
starts several on this machine.
"""

from absl import flags

from mhc import config as config_lib
from mhc.runtime import cli
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.training import profile
from mhc.training import run

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
cli.define_config('tiny')
cli.define_processes()
cli.define_end()
cli.define_profile()


def main():
  config = cli.config(config_lib.Config)
  profiled = profile.steps(flags.FLAGS.profile_steps)
  cli.join()
  summary = run.train(
    config,
    paths.path(WORKDIR.value),
    deadline=cli.deadline(),
    profiled=profiled,
  )
  if multihost.is_first():
    print(
      f'held-out loss {summary["heldout_nats"]:.4f} nats a token, '
      f'{_bits(summary["heldout_bits_per_byte"])} bits per byte, '
      f'{summary["num_params"]:,} parameters; everything is in {WORKDIR.value}'
    )


def _bits(value):
  return 'unknown' if value is None else f'{value:.4f}'


if __name__ == '__main__':
  cli.run(main)
