"""Which line comes next in held-out Python functions: runs beside each other.

python launch/cloze.py --workdir=runs/residual,runs/mhc --out=runs/cloze
"""

from absl import flags

from mhc.evaluation import cloze
from mhc.evaluation import runs
from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import workdir as workdir_lib

runs.define_flags()
PATH = flags.DEFINE_string(
  'path',
  None,
  "Python text whose held-out side is asked about; by default the first run's.",
)
ITEMS = flags.DEFINE_integer('items', 500, 'Items to ask.', lower_bound=2)
SEED = flags.DEFINE_integer('seed', 0, 'Which items are asked.', lower_bound=0)


def main():
  first = workdir_lib.read_config(paths.path(flags.FLAGS.workdir[0]))
  documents = cloze.heldout_documents(first.data, PATH.value)
  asked, found = cloze.items(documents, ITEMS.value, SEED.value), {}

  def rows_of(name, scorer):
    found[name] = cloze.answers(scorer, asked)
    return cloze.rows(name, found[name])

  runs.score(rows_of, ITEMS.value)
  for line in cloze.lines(cloze.differences(found)):
    print(line)


if __name__ == '__main__':
  cli.run(main)
