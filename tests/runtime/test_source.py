"""The commit that a figure names is this package's, or none."""

import shutil
import subprocess

from mhc.runtime import source


def test_commit(tmp_path, monkeypatch):
  def git(*words):
    own = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
    subprocess.run(['git', *own, *words], cwd=tmp_path, check=True)

  git('init', '-q')
  git('commit', '-q', '--allow-empty', '-m', 'somebody else')
  file = tmp_path / 'source.py'
  shutil.copy(source.__file__, file)
  monkeypatch.setattr(source, '__file__', str(file))
  commit = source.commit.__wrapped__
  # Installed into a folder of a repository that does not track it.
  assert commit() == ''
  git('add', '.')
  git('commit', '-qm', 'ours')
  clean = commit()
  assert len(clean) == 10
  file.write_text('')
  assert commit() == f'{clean}-dirty'
