"""Settings that had another name or value, in folders of earlier runs.

They are read for one release, so that those runs go on, and never written.
"""

from typing import Any

# By the end of the dotted name.
NAMES = {'mesh.parts': 'mesh.num_sub_batches'}
VALUES = {
  'moe.transport': {
    'gather': 'all_gather',
    'padded': 'all_to_all',
    'ragged': 'ragged_all_to_all',
  },
}


def current(name: str, value: Any) -> tuple[str, Any]:
  """The name and the value of today for a dotted name of any release."""
  for old, new in NAMES.items():
    if f'.{name}'.endswith(f'.{old}'):
      name = name.removesuffix(old) + new
  for setting, values in VALUES.items():
    if f'.{name}'.endswith(f'.{setting}') and isinstance(value, str):
      value = values.get(value, value)
  return name, value
