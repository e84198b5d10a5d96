"""Exports a run's model for other code, as safetensors.

python launch/export.py --workdir=runs/tiny --out=tiny

Writes the newest checkpoint's parameters, with the run's config.json and, if it
has one, tokenizer.json; docs/interop.md describes the tensors.
"""

from absl import flags

from mhc import interop
from mhc.runtime import cli
from mhc.runtime import paths

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
OUT = flags.DEFINE_string(
  'out', None, 'Folder to write, new or empty.', required=True
)
MAX_GIGABYTES = flags.DEFINE_float(
  'max_gigabytes',
  5.0,
  'Largest file in GB; larger models are sharded.',
  lower_bound=0.0,
)
TOKENIZER = cli.define_tokenizer()


def main():
  step = interop.export(
    paths.path(WORKDIR.value),
    paths.path(OUT.value),
    int(MAX_GIGABYTES.value * 1e9),
    TOKENIZER.value,
  )
  print(f'{OUT.value}: the model after {step} updates')


if __name__ == '__main__':
  cli.run(main, computes=False)
