"""Makes a trained model another kind of residual connection.

python launch/convert.py --from=runs/plain --to=mhc --out=runs/upcycled_start
python launch/train.py --workdir=runs/upcycled \
  --config=from_folder:runs/upcycled_start

--from is a run, an export, or a folder of Hugging Face (Llama, Qwen2, Qwen3,
DeepSeek-V3). The result starts as the same function, and by how much not is
printed; docs/upcycling.md.
"""

import dataclasses
import typing

from absl import flags

from mhc import config as config_lib
from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import added
from mhc.training import conversion
from mhc.training import start

FROM = flags.DEFINE_string(
  'from',
  None,
  'Folder of the model: a run, an export, or of Hugging Face.',
  required=True,
)
TO = flags.DEFINE_enum(
  'to', 'mhc', typing.get_args(config_lib.Kind), 'Kind of connection.'
)
OUT = flags.DEFINE_string(
  'out', None, 'Folder to write, new or empty.', required=True
)
NUM_STREAMS = flags.DEFINE_integer(
  'num_streams', 4, 'Streams of the residual.', lower_bound=1
)
CONNECTIONS = flags.DEFINE_string(
  'connections',
  None,
  'Folder of connections alone (launch/export.py --only=connections) to put '
  'onto the model, in place of new ones.',
)
ADAPTER_RANK = flags.DEFINE_integer(
  'adapter_rank', 0, 'Rank of adapters to add, 0 for none.', lower_bound=0
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of what is new.', lower_bound=0)
ALLOW_DIFFERENT = flags.DEFINE_bool(
  'allow_different', False, 'Accept a kind that starts as another function.'
)


def main():
  folder, out = paths.path(FROM.value), paths.path(OUT.value)
  if CONNECTIONS.value is not None:
    for name in ('to', 'num_streams', 'adapter_rank', 'seed'):
      if flags.FLAGS[name].present:
        raise ValueError(
          f'--{name}={flags.FLAGS[name].value} would not be used: the folder '
          'of --connections says what the model becomes'
        )
    added_to = paths.path(CONNECTIONS.value)
    source = added.attach(start.read(folder), added_to)
    conversion.write(source, added_to, out)
    print(f'{out}: {FROM.value} with the connections of {added_to}')
    return
  model = start.model_of(folder)
  connection = model.connection
  if (
    connection.kind == TO.value
    and flags.FLAGS['num_streams'].present
    and connection.num_streams != NUM_STREAMS.value
  ):
    raise ValueError(
      f'--num_streams={NUM_STREAMS.value} would not be used: {folder} has '
      f'connection.kind={TO.value!r} already, of {connection.num_streams}'
    )
  if connection.kind != TO.value:
    connection = config_lib.ConnectionConfig(
      kind=TO.value, num_streams=NUM_STREAMS.value
    )
  model = dataclasses.replace(
    model, connection=connection, adapter_rank=ADAPTER_RANK.value
  )
  source, difference = conversion.convert(
    folder, model, SEED.value, allow_different=ALLOW_DIFFERENT.value
  )
  conversion.write(source, folder, out)
  print(
    f'{out}: {FROM.value} as {TO.value}; logits differ by {difference:.1e} of '
    'their size'
  )


if __name__ == '__main__':
  cli.run(main)
