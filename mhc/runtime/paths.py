"""Paths as people give them: of this machine, or of a bucket.

    ~/runs/a              `~` is their home
    gs://BUCKET/runs/a    Google Cloud Storage, with the extra `gcs`

The first is a `pathlib.Path`, the second an `etils.epath.Path`, which has its
methods. What a bucket lacks is made up for elsewhere: renaming in `files`,
appending in `shadow`, bytes at random in `retry`. A list of a bucket is asked
for anew each time.
"""

import functools
import logging
import os
import pathlib
import re
from typing import Any

from etils import epath

Path = pathlib.Path | epath.Path

BUCKET = 'gs'
ANSWER_S = 10  # how long a bucket is waited for


def given(text: str, name: str) -> str:
  """A path, or pattern of paths, with `~` expanded, once it can be used.

  Args:
    text: as it was given.
    name: of what it was given for, such as --workdir.

  Raises:
    ValueError: it is a URL of another kind, or its bucket cannot be reached.
  """
  if not names_bucket(text):
    return local(text, name)
  if not re.match(r'gs://[^/]', text):
    raise ValueError(f'{name}={text} names no bucket: write gs://BUCKET/...')
  _reach(text, name)
  return text


def local(text: str, name: str) -> str:
  """As `given`, of this machine.

  Raises:
    ValueError: it is a URL.
  """
  if scheme := _scheme(text):
    way = 'copy' if scheme == BUCKET else 'mount'
    raise ValueError(
      f'{name}={text} is not a path of this machine: {way} what it names, and '
      'give that path'
    )
  return os.path.expanduser(text)


def path(text: str) -> Path:
  """The path that `given` has returned."""
  if not _scheme(text):
    return pathlib.Path(text)
  import fsspec.config  # only for buckets: slow to import

  # Else this process would not see what others write.
  options = fsspec.config.conf.setdefault(BUCKET, {})
  options.setdefault('use_listings_cache', False)
  # It logs the traceback of each attempt; what is raised in the end is said.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  return epath.Path(text)


def names_bucket(text: str) -> bool:
  return _scheme(text) == BUCKET


def in_bucket(path: Path) -> bool:
  return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
  return path if in_bucket(path) else path.absolute()


def filesystem(path: Path) -> Any:
  """The `fsspec` file system of a path in a bucket."""
  import fsspec

  assert in_bucket(path), path
  return fsspec.filesystem(BUCKET)


def _scheme(text: str) -> str:
  found = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):/', text)
  return found[1] if found else ''


def _reach(text, name):
  bucket = '/'.join(text.split('/')[:3])
  if trouble := _trouble(bucket):
    raise ValueError(f'{name}={text}{trouble}')


@functools.cache
def _trouble(bucket) -> str:
  """Why a bucket cannot be used, to follow its name; '' if it can."""
  try:
    system = filesystem(path(bucket))
    from fsspec import asyn

    # By itself it tries for minutes where there is no network.
    there = asyn.sync(system.loop, system._exists, bucket, timeout=ANSWER_S)
  except ImportError:
    return " needs gcsfs: pip install 'mhc-jax[gcs]'"
  except Exception as error:  # of credentials, network, service: of any class
    reason = ' '.join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, TimeoutError):
      reason = f'no answer in {ANSWER_S} s'
    return (
      f' cannot be reached ({reason}): check the network, and the credentials '
      'of this machine'
    )
  return '' if there else f': there is no {bucket}, or it may not be listed'
