"""Where paths lead, and which are none of this machine."""

import pathlib

import fsspec
import pytest

from mhc.data import corpus as corpus_lib
from mhc.data import sources
from mhc.runtime import paths


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.given('~/runs/a', '--workdir') == f'{tmp_path}/runs/a'
  for path in ('', 'runs/~', '/abs', 'texts/**/*.txt', 'a:b', 'c:', 'x=1:2/y'):
    assert paths.given(path, '--path') == path
    assert paths.path(path) == pathlib.Path(path)
  (tmp_path / 'texts').mkdir()
  (tmp_path / 'texts/a.txt').write_text('some text ' * 50)
  assert corpus_lib.load('~/texts').num_documents == 1
  assert sources.open_source('~/texts/*.txt', 'text').total == 500


@pytest.mark.parametrize('scheme', ['s3', 'file', 'https', 'abfs', 'GS'])
def test_a_url_of_another_kind_is_refused(scheme):
  path = f'{scheme}://bucket/x'
  for load in (
    lambda: paths.given(path, '--workdir'),
    lambda: corpus_lib.load(path),
    lambda: sources.open_source(path, 'text'),
    # As pathlib writes it.
    lambda: paths.given(str(pathlib.Path(path)), '--out'),
  ):
    with pytest.raises(ValueError, match=r'not a path of this machine.*mount'):
      load()
  with pytest.raises(ValueError, match=r'--x=gs://b/a is not a path.*: copy'):
    paths.local('gs://b/a', '--x')


@pytest.mark.parametrize('path', ['gs:/bucket/x', 'gs:///x', 'gs://'])
def test_a_url_without_a_bucket_is_refused(path):
  with pytest.raises(ValueError, match='names no bucket: write gs://BUCKET/'):
    paths.given(path, '--workdir')


def test_a_bucket_needs_its_package(monkeypatch):

  def filesystem(scheme):
    raise ImportError

  monkeypatch.setattr(fsspec, 'filesystem', filesystem)
  with pytest.raises(ValueError, match=r"needs gcsfs: .*'mhc-jax\[gcs\]'"):
    paths.given('gs://bucket/x', '--workdir')


def test_a_main_makes_no_folder_of_that_name(launch, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, *arguments in (
    ('train.py', '--workdir=s3://bucket/run'),
    ('prepare_data.py', '--out=abfs://bucket/tokens'),
    ('compare.py', '--workdir=s3://bucket/runs'),
  ):
    result = launch(name, *arguments)
    assert result.returncode == 2, result.stderr
    assert 'is not a path of this machine' in result.stderr
  assert not any(tmp_path.iterdir())
