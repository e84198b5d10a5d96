"""Which source runs."""

import functools
import pathlib
import subprocess


@functools.cache
def commit() -> str:
  """The commit of this package's clone, with '-dirty' if it was changed.

  '' where there is none: for an installed package also if the folder that it
  is installed in happens to lie in a repository of its user.
  """
  file = pathlib.Path(__file__)
  try:
    _git(file, 'ls-files', '--error-unmatch', file.name)
    return _git(file, 'describe', '--always', '--dirty', '--abbrev=10')
  except (OSError, subprocess.CalledProcessError):
    return ''


def _git(file, *words):
  command = ['git', *words]
  done = subprocess.run(
    command, cwd=file.parent, capture_output=True, text=True, check=True
  )
  return done.stdout.strip()
