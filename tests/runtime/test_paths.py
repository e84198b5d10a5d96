"""Where paths lead, and which are none of this machine."""

import pathlib

import pytest

from mhc.data import corpus as corpus_lib
from mhc.data import sources
from mhc.runtime import paths


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert paths.local('~/runs/a', '--workdir') == f'{tmp_path}/runs/a'
  for path in ('', 'runs/~', '/abs', 'texts/**/*.txt', 'a:b', 'c:', 'x=1:2/y'):
    assert paths.local(path, '--path') == path
  (tmp_path / 'texts').mkdir()
  (tmp_path / 'texts/a.txt').write_text('some text ' * 50)
  assert corpus_lib.load('~/texts').num_documents == 1
  assert sources.open_source('~/texts/*.txt', 'text').total == 500


@pytest.mark.parametrize('scheme', ['gs', 's3', 'file', 'https', 'abfs'])
def test_a_url_is_refused(scheme):
  path = f'{scheme}://bucket/x'
  for load in (
    lambda: paths.local(path, '--workdir'),
    lambda: corpus_lib.load(path),
    lambda: sources.open_source(path, 'text'),
    # As pathlib writes it.
    lambda: paths.local(str(pathlib.Path(path)), '--out'),
  ):
    with pytest.raises(ValueError, match=r'not a path of this machine.*mount'):
      load()


def test_a_main_makes_no_folder_of_that_name(launch, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, *arguments in (
    ('train.py', '--workdir=gs://bucket/run'),
    ('prepare_data.py', '--out=gs://bucket/tokens'),
    ('compare.py', '--workdir=s3://bucket/runs'),
  ):
    result = launch(name, *arguments)
    assert result.returncode == 2, result.stderr
    assert 'is not a path of this machine' in result.stderr
  assert not any(tmp_path.iterdir())
