"""The record beside a saved state: what it is, signed, to verify it by.

It has the format, the settings of the run, the type, shape and checksum of
every array, and the extra values saved with the state.
"""

from collections.abc import Mapping
import hashlib
import json
from typing import Any

import jax

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import files
from mhc.runtime import paths
from mhc.training import checksum
from mhc.training import state as state_lib
from mhc.training import workdir as workdir_lib

FORMAT = 'mhc checkpoint 1'


class Corrupted(Exception):
  """A checkpoint differs from what was written."""


def make(
  config: config_lib.Config,
  state: state_lib.TrainState,
  extra: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the signed record of a state."""
  digits = checksum.tree_checksums(state)
  arrays = {
    name: [*known, digits[name]] for name, known in _shapes(state).items()
  }
  record = {
    'format': FORMAT,
    'config': dicts.leaves(config),
    'arrays': arrays,
    'extra': dict(extra),
  }
  record = json.loads(json.dumps(files.jsonable(record)))
  return {'record': record, 'sha256': digest(record)}


def digest(record: Mapping[str, Any]) -> str:
  text = json.dumps(record, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def verified(signed: Any, where: paths.Path) -> dict[str, Any]:
  """Returns the record in a signed one, which was read from `where`.

  Raises:
    Corrupted: it does not match its digest.
    ValueError: it has another format.
  """
  try:
    record, sha256 = signed['record'], signed['sha256']
  except (TypeError, KeyError):
    raise Corrupted('its record is malformed') from None
  if digest(record) != sha256:
    raise Corrupted('its record does not match its digest')
  if record['format'] != FORMAT:
    raise ValueError(
      f'{where} is in the format {record["format"]!r}, this version of mhc '
      f'reads {FORMAT!r}: go on with the version that wrote it'
    )
  return record


def check_config(
  record: Mapping[str, Any], config: config_lib.Config, where: paths.Path
):
  """Raises ValueError if the record is of a run with other settings."""
  difference = workdir_lib.other_setting(record['config'], config)
  if difference:
    raise ValueError(
      f'{where} is the state of a run with {difference}: choose another '
      '--workdir'
    )


def check_shapes(
  record: Mapping[str, Any], abstract: state_lib.TrainState, where: paths.Path
):
  """Raises ValueError if the record's arrays are not those of `abstract`.

  The optimiser's are not compared if `abstract` has none.
  """
  ours = _shapes(abstract)
  theirs = {
    name: known[:2]
    for name, known in record['arrays'].items()
    if abstract.opt_state is not None or name.split('.')[0] != 'opt_state'
  }
  for name in theirs | ours:
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f'{where} holds {name}={theirs.get(name)}, this model and optimiser '
        f'have {ours.get(name)}: choose another --workdir'
      )


def check_sums(record: Mapping[str, Any], state: state_lib.TrainState):
  """Raises Corrupted if an array of a state differs from its checksum."""
  for name, digits in checksum.tree_checksums(state).items():
    if digits != record['arrays'][name][2]:
      raise Corrupted(f'{name} does not match its checksum')


def renamed(tree: Any, old: str, new: str) -> Any:
  """Renames a key in every dict of a tree of arrays."""

  def has_old(node):
    return isinstance(node, dict) and old in node

  def rename(node):
    if not has_old(node):
      return node
    return {new if key == old else key: item for key, item in node.items()}

  return jax.tree.map(rename, tree, is_leaf=has_old)


def _shapes(tree):
  """Path -> [dtype, shape], in the order of `checksum.tree_checksums`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): [
      leaf.dtype.name,
      [*leaf.shape],
    ]
    for path, leaf in leaves
  }
