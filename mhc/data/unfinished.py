"""A token folder that is being made, and what is there of it.

    parts/plan.json             what all calls for the folder must agree on
    parts/vocabulary.json       a vocabulary that was learned
    parts/00000-0000000.part    of machine 0, its first one (`parts`)
    parts/00000-0000000.json    its record: what it is of, and where to read on
    parts/train-00000.json      the record of a shard that is whole

A record is written when what it is of is whole; the last part of a machine
says that it is. The index of the folder comes last; then parts/ is deleted.
"""

from collections.abc import Callable
import json
from typing import Any

from mhc.data import token_dataset
from mhc.runtime import files as files_lib
from mhc.runtime import paths

SIZES = 'num_buckets', 'part_bytes'
HINT = 'choose another folder, or delete it to begin again'


class Folder:
  """The folder `path` of a plan, whose fields JSON can hold."""

  def __init__(self, path: paths.Path, plan: dict[str, Any]):
    """Begins the folder, or goes on with it.

    Raises:
      ValueError: it holds something else, or was begun by another plan.
    """
    self.path, self._parts, self.plan = path, path / 'parts', plan
    self.vocabulary = self._parts / 'vocabulary.json'
    marks = path / 'index.json', path / token_dataset.UNFINISHED
    if not any(file.exists() for file in (*marks, self.vocabulary)):
      foreign = files_lib.all_files(path)
      if foreign:
        name = foreign[0].relative_to(path)
        raise ValueError(f'{path} is not empty ({name}): {HINT}')

  def finished(self, fingerprint: str) -> dict[str, Any] | None:
    """The index, if all is done.

    Raises:
      ValueError: it holds other tokens.
    """
    index = self.path / 'index.json'
    if index.exists():
      found = token_dataset.read_index(index)
      if found.get('made_by') != self._made_by(fingerprint):
        raise ValueError(f'{self.path} holds tokens already: {HINT}')
      files_lib.delete_tree(self._parts)
      return found
    if not paths.in_bucket(path := self._parts):
      path.mkdir(parents=True, exist_ok=True)
    return None

  def agree(self) -> dict[str, Any]:
    """Begins by the plan, or goes on by that of the first call.

    Raises:
      ValueError: that is another one; but for `SIZES`, which follow from files.
    """
    file = self.path / token_dataset.UNFINISHED
    if not file.exists():
      files_lib.replace(file, json.dumps(self.plan), shared=True)
    begun = files_lib.read_json(file)
    for name, value in self.plan.items():
      if begun.get(name) != value and name not in SIZES:
        raise ValueError(
          f'{self.path} was begun with {name}={begun.get(name)!r}, not '
          f'{value!r}: {HINT}'
        )
    self.plan = begun
    return begun

  def discard(self):
    """Deletes what is unfinished."""
    files_lib.delete_tree(self._parts)

  def part(self, machine: int, number: int) -> paths.Path:
    return self._parts / f'{machine:05d}-{number:07d}.part'

  def records(
    self, machine: int, stamp: Callable[[int], list[int]] | None = None
  ) -> list[dict[str, Any]]:
    """The records of a machine's parts, up to the first that is missing.

    With `stamp`, also up to the first whose files have changed.
    """
    found = []
    while True:
      part = self.part(machine, len(found))
      record = part.with_suffix('.json')
      if not record.exists() or not part.exists():
        return found
      try:
        values = files_lib.read_json(record)
      except ValueError:  # it is made again
        return found
      stamps = values['stamps'].items() if stamp else ()
      if any(stamp(int(file)) != then for file, then in stamps):
        return found
      found.append(values)

  def begin_parts(self):
    """To be called before parts are added: shards of fewer are of no use."""
    for record in self._parts.glob('*.json'):
      if record.name.startswith(token_dataset.SIDES):
        record.unlink(missing_ok=True)

  def add_record(self, machine: int, record: dict[str, Any]):
    """Adds a part's record; those after it are of something else."""
    number = record['number']
    self.part(machine, number + 1).with_suffix('.json').unlink(missing_ok=True)
    file = self.part(machine, number).with_suffix('.json')
    files_lib.replace(file, json.dumps(record))

  def all_records(self) -> list[list[dict[str, Any]]]:
    """The records of each machine.

    Raises:
      ValueError: one has not finished.
    """
    found = [self.records(i) for i in range(self.plan['num_machines'])]
    missing = [
      number
      for number, records in enumerate(found)
      if not records or not records[-1]['is_last']
    ]
    if missing:
      raise ValueError(
        f'{self.path} lacks the tokens of {len(missing)} machines, such as '
        f'--shard={missing[0]}/{len(found)}: run it (again) before the merge'
      )
    return found

  def shard_record(self, name: str) -> paths.Path:
    """The record of a shard, such as train-00000."""
    return self._parts / f'{name}.json'

  def close(self, index: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """Writes the index."""
    index = index | {'made_by': self._made_by(fingerprint)}
    token_dataset.write_index(self.path, index)
    for leftover in self.path.glob('*.partial'):  # of calls that were killed
      leftover.unlink(missing_ok=True)
    files_lib.delete_tree(self._parts)
    return index

  def _made_by(self, fingerprint):
    plan = {name: self.plan[name] for name in self.plan if name not in SIZES}
    return plan | {'inputs': fingerprint}
