"""Files of this machine behind those of a bucket, which cannot be appended to.

Who writes line by line writes the shadow, and uploads it now and then: at
checkpoints, and at the end. A start in the same folder takes up the shadow
where it has more than the bucket, after a kill, and the bucket's file
otherwise, as on another machine. A path of this machine is its own shadow.
"""

import hashlib
import os
import pathlib
import shutil
import tempfile

from mhc.runtime import console
from mhc.runtime import paths
from mhc.runtime import retry

_uploaded: dict[pathlib.Path, tuple[int, int]] = {}  # size and time of change
_reported: set[str] = set()


def place(path: paths.Path) -> pathlib.Path:
  """Where the shadow of a file or folder is, or can be."""
  if not paths.in_bucket(path):
    return path
  digest = hashlib.sha256(str(path.parent).encode()).hexdigest()[:20]
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  for root in cache, tempfile.gettempdir():
    folder = pathlib.Path(root, f'mhc-{os.getuid()}', digest)
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that is read only
      continue
    return folder / path.name
  raise OSError(f'{cache} cannot be written: set XDG_CACHE_HOME')


def of_file(path: paths.Path) -> pathlib.Path:
  """The shadow of a file, with what is known of it by now."""
  if not paths.in_bucket(path):
    return path
  there = _bytes(path) if retry.with_retries(path.exists, path) else b''
  shadow = place(path)
  here = shadow.read_bytes() if shadow.is_file() else b''
  # Without the bucket's file, what is here is of a run that was deleted.
  if not there or not here.startswith(there):
    shadow.write_bytes(there)
  return shadow


def of_folder(path: paths.Path) -> pathlib.Path:
  """The shadow of a folder, with what this machine has written to it."""
  if not paths.in_bucket(path):
    return path
  shadow = place(path)
  if not retry.with_retries(path.exists, path):
    shutil.rmtree(shadow, ignore_errors=True)
  shadow.mkdir(parents=True, exist_ok=True)
  return shadow


def upload(path: paths.Path):
  """Uploads what has changed of a shadow; a failure is said, and made up for.

  The next upload takes it along.
  """
  if not paths.in_bucket(path):
    return
  shadow = place(path)
  files = [f for f in shadow.rglob('*') if f.is_file()]
  for file in files if shadow.is_dir() else [shadow]:
    status = file.stat()
    state = status.st_size, status.st_mtime_ns
    if _uploaded.get(file) == state:
      continue
    target = path / file.relative_to(shadow).as_posix()
    try:
      retry.as_os_error(
        lambda file=file, target=target: paths.filesystem(path).put_file(
          str(file), str(target)
        ),
        target,
      )
    except OSError as error:
      if str(path) not in _reported:
        console.print_line(
          f'NOT UPLOADED: {path}: {error}. It is kept in {shadow}, and tried '
          'again at the next checkpoint.'
        )
      _reported.add(str(path))
      return
    _uploaded[file] = state
  _reported.discard(str(path))


def _bytes(path) -> bytes:
  return retry.with_retries(path.read_bytes, path)
