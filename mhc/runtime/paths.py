"""Paths as people give them: `~` is their home; buckets must be mounted."""

import os
import re


def local(path: str, name: str) -> str:
  """The path, or pattern of paths, with `~` expanded.

  Args:
    path: as it was given.
    name: of what it was given for, such as --workdir.

  Raises:
    ValueError: it is a URL: files are read and written by the file system.
  """
  if scheme := re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', path):
    raise ValueError(
      f'{name}={path} is not a path of this machine: mount what '
      f'{scheme.group()}/ names (by gcsfuse, as launch/tpu_pod.sh does), and '
      'give the folder'
    )
  return os.path.expanduser(path)
