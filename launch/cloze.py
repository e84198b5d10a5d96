"""Which line comes next in held-out Python functions: runs beside each other.

python launch/cloze.py --workdir=runs/residual,runs/mhc --out=runs/cloze
"""

from absl import flags

from mhc.evaluation import cloze
from mhc.evaluation import scoring
from mhc.evaluation import summary
from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import workdir as workdir_lib

WORKDIR = flags.DEFINE_list(
  'workdir', None, 'Folders of the runs, separated by commas.', required=True
)
PATH = flags.DEFINE_string(
  'path',
  None,
  "Python text whose held-out side is asked about; by default the first run's.",
)
ITEMS = flags.DEFINE_integer('items', 500, 'Items to ask.', lower_bound=2)
SEED = flags.DEFINE_integer('seed', 0, 'Which items are asked.', lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 16, 'Rows that are computed at once.', lower_bound=1
)
OUT = flags.DEFINE_string(
  'out', None, 'Folder for results.json and table.md.', required=True
)
TOKENIZER = cli.define_tokenizer()


def main():
  workdirs = {name: paths.path(name) for name in WORKDIR.value}
  first = workdir_lib.read_config(next(iter(workdirs.values())))
  documents = cloze.heldout_documents(first.data, PATH.value)
  asked = cloze.items(documents, ITEMS.value, SEED.value)
  rows, records, found = [], {}, {}
  for name, workdir in workdirs.items():
    scorer = scoring.of_run(workdir, TOKENIZER.value, BATCH_SIZE.value)
    found[name] = cloze.answers(scorer, asked)
    rows += cloze.rows(name, found[name])
    records[name] = scorer.record()
  summary.write(paths.path(OUT.value), rows, records, ITEMS.value)
  print(summary.markdown(rows, records))
  for line in cloze.lines(cloze.differences(found)):
    print(line)


if __name__ == '__main__':
  cli.run(main)
