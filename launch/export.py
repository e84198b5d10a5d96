"""Exports a run's model for other code, as safetensors.

python launch/export.py --workdir=runs/tiny --out=tiny

Writes the newest checkpoint's parameters, with the run's config.json and, if it
has one, tokenizer.json; docs/interop.md describes the tensors. Models
of kind residual, mhc and identity can be written for transformers:
--format=huggingface.
"""

from absl import flags

from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import added
from mhc.training import export

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
FORMAT = flags.DEFINE_enum(
  'format',
  'mhc',
  ['mhc', 'huggingface'],
  "Names of the tensors: this package's, or those of a class of transformers; "
  'mHC brings its own along.',
)
ONLY = flags.DEFINE_enum(
  'only',
  None,
  ['connections'],
  'Write the connections and adapters alone, for the same base.',
)
TOKENIZER = cli.define_tokenizer()


def main():
  where = paths.path(WORKDIR.value), paths.path(OUT.value)
  if ONLY.value:
    if FORMAT.value != 'mhc':
      raise ValueError(
        f'--only={ONLY.value} has tensors of --format=mhc alone, not of '
        f'{FORMAT.value}'
      )
    step = added.export(*where, TOKENIZER.value)
  else:
    size = int(MAX_GIGABYTES.value * 1e9)
    step = export.export(*where, size, TOKENIZER.value, FORMAT.value)
  print(f'{OUT.value}: the model after {step} updates')


if __name__ == '__main__':
  cli.run(main, computes=False)
