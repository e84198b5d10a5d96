"""Runs that are scored beside each other: the flags, and what is written."""

from collections.abc import Callable, Sequence

from absl import flags

from mhc.evaluation import scoring
from mhc.evaluation import summary
from mhc.runtime import cli
from mhc.runtime import paths


def define_flags():
  """Defines --workdir, --batch_size, --out and --tokenizer."""
  flags.DEFINE_list(
    'workdir', None, 'Folders of the runs, separated by commas.', required=True
  )
  flags.DEFINE_integer(
    'batch_size', 16, 'Rows that are computed at once.', lower_bound=1
  )
  flags.DEFINE_string(
    'out', None, 'Folder for results.json and table.md.', required=True
  )
  cli.define_tokenizer()


def score(
  rows_of: Callable[[str, scoring.Scorer], Sequence[summary.Row]],
  limit: int | None,
):
  """Scores the newest checkpoint of each run, writes the table and prints it.

  Args:
    rows_of: from the name of a run and its scorer.
    limit: documents that a task is limited to, for the record.
  """
  given, rows, records = flags.FLAGS, [], {}
  for name in given.workdir:
    scorer = scoring.of_run(paths.path(name), given.tokenizer, given.batch_size)
    rows += rows_of(name, scorer)
    records[name] = scorer.record()
  summary.write(paths.path(given.out), rows, records, limit)
  print(summary.markdown(rows, records))
