"""Settings of earlier runs, under the names of then."""

import pytest

from mhc import config
from mhc.config import aliases, comparison, dicts


def test_old_names_and_values_are_read():
  old = dicts.to_dict(config.Config())
  old['mesh']['parts'] = old['mesh'].pop('num_sub_batches') + 1
  old['model']['moe']['transport'] = 'gather'
  new = dicts.from_dict(config.Config, old)
  assert new.mesh.num_sub_batches == 2
  assert new.model.moe.transport == 'all_gather'
  base = dicts.from_dict(comparison.Comparison, {'base': old}).base
  assert base == new


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    (('mesh.parts', 2), ('mesh.num_sub_batches', 2)),
    (('model.moe.transport', 'padded'), ('model.moe.transport', 'all_to_all')),
    (
      ('base.model.moe.transport', 'ragged'),
      ('base.model.moe.transport', 'ragged_all_to_all'),
    ),
    (('model.moe.transport', 'auto'), ('model.moe.transport', 'auto')),
    (('seed', 3), ('seed', 3)),
    # Only whole names.
    (('panel.mymesh.parts', 1), ('panel.mymesh.parts', 1)),
  ],
)
def test_what_is_renamed(old, new):
  assert aliases.current(*old) == new


def test_every_alias_is_a_setting():
  known = dicts.leaves(config.Config())
  for name in aliases.NAMES.values():
    assert any(setting.endswith(name) for setting in known)
  for name in aliases.VALUES:
    assert any(setting.endswith(name) for setting in known)
  assert not any(name.endswith(old) for name in known for old in aliases.NAMES)
