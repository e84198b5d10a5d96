"""Former names and values of settings, in work directories of earlier runs.

They are read for one release, so that those runs can be resumed, and never
written.
"""

from typing import Any

# The ends of dotted names, before and now.
NAMES = {'mesh.parts': 'mesh.num_sub_batches'}
VALUES = {
  'moe.transport': {
    'gather': 'all_gather',
    'padded': 'all_to_all',
    'ragged': 'ragged_all_to_all',
  },
}


def current(name: str, value: Any) -> tuple[str, Any]:
  """Returns the current name and value for a dotted name of any release."""
  for old, new in NAMES.items():
    if f'.{name}'.endswith(f'.{old}'):
      name = name.removesuffix(old) + new
  for setting, values in VALUES.items():
    if f'.{name}'.endswith(f'.{setting}') and isinstance(value, str):
      value = values.get(value, value)
  return name, value
