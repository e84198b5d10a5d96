"""With MHC_TEST_BUCKET=1, the folders of these tests are in a bucket.

    MHC_TEST_BUCKET=1 .venv/bin/python -m pytest tests/training

What only a disk can do (permissions, links, no room) is marked `on_disk`.
"""

import os

import pytest

if os.environ.get('MHC_TEST_BUCKET'):

  class Folders:
    """New folders in a bucket, with the methods of pytest's own factory."""

    def __init__(self, factory):
      self.getbasetemp, self._count = factory.getbasetemp, 0

    def mktemp(self, name):
      import bucket_server

      from mhc.runtime import paths

      self._count += 1
      return paths.path(f'{bucket_server.URL}/{name}-{self._count}')

  @pytest.fixture(scope='session')
  def tmp_path_factory(object_store, tmp_path_factory):
    os.environ.update(object_store.settings)
    return Folders(tmp_path_factory)

  @pytest.fixture
  def tmp_path(tmp_path_factory):
    return tmp_path_factory.mktemp('test')

  def pytest_collection_modifyitems(items):
    items[:] = [
      item for item in items if not item.get_closest_marker('on_disk')
    ]
