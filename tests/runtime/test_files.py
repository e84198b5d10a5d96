"""Files that are whole, or named in one line."""

import os

import numpy as np
import pytest

from mhc.runtime import files


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  files.replace(path, 'old')
  files.replace_array(tmp_path / 'b.npy', np.arange(3))
  assert np.load(tmp_path / 'b.npy').tolist() == [0, 1, 2]

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'sync', full)
  for shared in (False, True):
    with pytest.raises(OSError, match='No space left'):
      files.replace(path, 'new', shared=shared)
  assert path.read_text() == 'old'
  assert sorted(os.listdir(tmp_path)) == ['a.json', 'b.npy']


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'it is empty'),
    (b' \n', 'it is empty'),
    (b'null', 'it holds null, not an object'),
    (b'[]', r'it holds \[\], not an object'),
    (b'{"a": ', 'it is not JSON'),
    (b'\xff\xfe{', 'it is not JSON'),
    (b'[' * 100_000, 'it is not JSON'),
  ],
)
def test_damage_is_named_with_the_file(content, message, tmp_path):
  path = tmp_path / 'summary.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf'summary\.json is damaged: {message}'):
    files.read_json(path)


def test_what_is_set_aside_replaces_nothing(tmp_path):
  for number in range(3):
    path = tmp_path / 'a'
    path.write_text(str(number))
    files.set_aside(path)
  names = ['a.old', 'a.old-2', 'a.old-3']
  assert [(tmp_path / n).read_text() for n in names] == ['0', '1', '2']
