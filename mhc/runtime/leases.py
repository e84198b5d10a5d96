"""A lease: a job that one process of many holds, by files in a shared folder.

A job's claims are FOLDER/NAME.0, NAME.1, ...; the newest one counts. A claim is
made by creating the file, which only one process can (O_EXCL), and is never
deleted, so that nobody can make an old one again: who sees an old list of the
folder, as on NFS, loses. In a bucket it is an upload under the condition that
there is no such object. All else that is asked of the file system is that who
opens a file reads what was in it when it was last closed; of the machines'
clocks, nothing. The next claim is made

* by anyone, if the newest one says that it was released;
* by anyone, if it is stale: its content has not changed for `patience` seconds
  of the watcher's own monotonic clock, or its process on this host is gone;
* by the holder itself, if it was late to change the content, so that others may
  think it dead. Who loses this race has lost the job.

The folder stays as it is while workers run.
"""

from collections.abc import Callable, Iterable
import contextlib
import errno
import functools
import json
import os
import pathlib
import re
import socket
import threading
import time
from typing import Any, NamedTuple
import urllib.parse

from mhc.runtime import console
from mhc.runtime import paths
from mhc.runtime import retry

PATIENCE = 60.0  # seconds
BEATS = 6  # signs of life in that time
LOST_STATUS = 3  # the exit status of a process that has lost its job
SIZE = 512  # bytes: always the same, so that a full disk has room for them


class Lease:
  """A job that this process holds, as a context that releases it.

  A daemon thread gives signs of life. Errors of the file system are reported
  once, and it tries again. Should another process have the job, because this
  one was suspended for longer than the patience, the thread calls `lost`.
  """

  def __init__(
    self,
    folder: paths.Path,
    name: str,
    generation: int,
    since: float,
    patience: float,
    lost: Callable[['Lease'], None],
  ):
    """`take` makes it. `since` is a time just before the claim was made."""
    self.folder, self.name, self.generation = folder, name, generation
    self.patience = patience
    self._since, self._lost, self._has_lost = since, lost, False
    self._count, self._reported = 0, False
    self._ended = threading.Event()
    self._try(self._write)
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def __enter__(self) -> 'Lease':
    return self

  def __exit__(self, *_):
    self.release()

  def release(self):
    """Leaves the job, finished or given up, to the next that wants it."""
    if self._ended.is_set():
      return
    self._ended.set()
    if self._thread is not threading.current_thread():
      self._thread.join()
    if not self._has_lost:
      self._try(lambda: self._write(released=True))

  def _run(self):
    while not self._ended.wait(self.patience / BEATS):
      if self._try(self._beat) is False:
        self._has_lost = True
        self._lost(self)
        return

  def _try(self, action):
    try:
      result = action()
    except OSError as error:
      if not self._reported:
        console.print_line(
          f'{self.name}: no sign of life: {error}. It is tried again; after '
          f'{self.patience:g} s another worker may take this job.'
        )
      self._reported = True
      return None
    self._reported = False
    return result

  def _beat(self) -> bool:
    """Gives a sign of life; returns whether the job is still this process's."""
    started = time.monotonic()
    following = _file(self.folder, self.name, self.generation + 1)
    if retry.as_os_error(following.exists, following):
      return False
    self._write()
    if time.monotonic() - self._since <= self.patience / 2:
      self._since = started
      return True
    # Late: someone may be about to make the next claim, and a cached folder may
    # hide that one has.
    started = time.monotonic()
    if not retry.as_os_error(lambda: _create(following), following):
      return False
    self.generation, self._since = self.generation + 1, started
    self._write()
    return True

  def _write(self, released=False):
    self._count += 1
    values = {
      **_this_process(os.getpid()),
      'sign_of_life': f'{self._count:012}',
      'released': released,
    }
    data = (json.dumps(values).ljust(SIZE - 1) + '\n').encode()
    file = _file(self.folder, self.name, self.generation)
    if paths.in_bucket(file):
      put = paths.filesystem(file).pipe_file
      retry.as_os_error(lambda: put(str(file), data), file)
      return
    # Opened each time: on NFS others see what was written when it is closed.
    descriptor = os.open(file, os.O_WRONLY)
    try:
      if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
      os.close(descriptor)


class Watcher:
  """What this process has seen of claims, and for how long."""

  def __init__(self, patience: float = PATIENCE):
    """`patience`, in seconds, must be that of the holders."""
    if patience <= 0:
      raise ValueError(f'a patience of {patience} s must be more than 0 s')
    self.patience = patience
    self._seen: dict[paths.Path, tuple[bytes, float]] = {}
    self._known: dict[tuple[paths.Path, str], int] = {}

  def free(self, folder: paths.Path, names: Iterable[str]) -> list[str]:
    """Returns those that nobody holds, in the given order."""
    newest = self.newest(folder)
    return [n for n in names if self.is_free(folder, n, newest.get(n, -1))]

  def newest(self, folder: paths.Path) -> dict[str, int]:
    """The newest generation of every job that has been claimed."""
    newest = _generations(folder)
    for (other, name), generation in self._known.items():
      if other == folder:
        newest[name] = max(newest.get(name, -1), generation)
    return newest

  def note(self, folder: paths.Path, name: str, generation: int):
    """Remembers a claim that a cached list of the folder may not show."""
    self._known[folder, name] = generation

  def is_free(self, folder: paths.Path, name: str, generation: int) -> bool:
    """Whether a job may be taken whose newest claim is this, -1 for none."""
    if generation < 0:
      return True
    file = _file(folder, name, generation)
    before = time.monotonic()
    content = _read(file)
    known, since = self._seen.get(file, (None, 0.0))
    if content != known:
      self._seen[file] = content, time.monotonic()
    elif before - since >= self.patience:
      return True
    values = _parse(content)
    return values.get('released') is True or _is_gone(values)


def end_process(lease: Lease):
  """Ends this process at once: another one writes in the folder of the job."""
  with contextlib.suppress(OSError):
    holder = held_by(lease.folder, lease.name)
    # Not by print, whose lock another thread may hold.
    os.write(
      2,
      f'\n{lease.name}: lost to {holder}: this process was suspended, or could '
      f'not write, for {lease.patience:g} s; it ends, so that only one trains '
      'it.\n'.encode(),
    )
  os._exit(LOST_STATUS)


def take(
  folder: paths.Path,
  name: str,
  watcher: Watcher,
  lost: Callable[[Lease], None] = end_process,
) -> Lease | None:
  """Takes a job; returns None if another process holds or has just taken it.

  Raises:
    ValueError: the name is empty.
    OSError: no claim can be made in `folder`.
  """
  if not name:
    raise ValueError(f'{name!r} is no name of a job: give it one')
  if not paths.in_bucket(folder):
    folder.mkdir(parents=True, exist_ok=True)
  newest = watcher.newest(folder).get(name, -1)
  if not watcher.is_free(folder, name, newest):
    return None
  generation, since = newest + 1, time.monotonic()
  file = _file(folder, name, generation)
  if not retry.with_retries(lambda: _create(file), file):
    watcher.note(folder, name, generation)
    return None
  return Lease(folder, name, generation, since, watcher.patience, lost)


def take_when_free(
  folder: paths.Path,
  name: str,
  patience: float = PATIENCE,
  lost: Callable[[Lease], None] = end_process,
  poll_s: float = 0.5,
) -> Lease:
  """Takes a job, if need be after `patience` seconds without a sign of life.

  Raises:
    ValueError: another process does it, alive; the message names it.
  """
  watcher, newest, said = Watcher(patience), None, False
  while True:
    if lease := take(folder, name, watcher, lost):
      return lease
    generation = watcher.newest(folder)[name]
    content = _read(_file(folder, name, generation))
    if _is_alive_here(_parse(content)) or newest not in (None, content):
      raise ValueError(
        f'{folder.parent} is in use by {held_by(folder, name)}: wait for it, '
        'end it, or choose another folder'
      )
    if not said:
      console.print_line(
        f'{folder.parent}: waiting up to {patience:g} s for a sign of life of '
        f'{held_by(folder, name)}'
      )
    newest, said = content, True
    time.sleep(min(poll_s, patience / BEATS))


def held_by(folder: paths.Path, name: str) -> str:
  """Returns a line for people: "host 'a', process 123, generation 2"."""
  generation = _generations(folder).get(name)
  if generation is None:
    return 'nobody'
  values = _parse(_read(_file(folder, name, generation)))
  if not {'host', 'pid'} <= values.keys():
    return f'an unreadable claim, generation {generation}'
  line = (
    f'host {values["host"]!r}, process {values["pid"]}, generation {generation}'
  )
  return f'nobody, released by {line}' if values.get('released') else line


def _file(folder, name, generation) -> paths.Path:
  return folder / f'{urllib.parse.quote(name, safe="")}.{generation}'


def _generations(folder) -> dict[str, int]:
  """The newest generation of every job that has been claimed."""
  newest: dict[str, int] = {}
  try:
    files = retry.with_retries(lambda: _names(folder), folder)
  except FileNotFoundError:
    files = []
  for file in files:
    if found := re.fullmatch(r'(.+)\.(0|[1-9][0-9]*)', file):
      name = urllib.parse.unquote(found[1])
      newest[name] = max(newest.get(name, -1), int(found[2]))
  return newest


def _names(folder) -> list[str]:
  if paths.in_bucket(folder):
    return [file.name for file in folder.iterdir()]
  return os.listdir(folder)


def _create(file) -> bool:
  """Creates an empty file; returns False if there is one already."""
  try:
    if paths.in_bucket(file):
      paths.filesystem(file).pipe_file(str(file), b'', mode='create')
      return True
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
  except FileExistsError:
    return False
  return True


def _read(file) -> bytes:
  try:
    return retry.with_retries(file.read_bytes, file)
  except FileNotFoundError:  # which a cache may say of one that is there
    return b''


def _parse(content: bytes) -> dict[str, Any]:
  """Returns the values of a claim, {} if it was not written to its end."""
  try:
    values = json.loads(content)
  except (ValueError, RecursionError):
    return {}
  return values if isinstance(values, dict) else {}


class _Place(NamedTuple):
  """Where process numbers mean the same; an unknown part is None."""

  host: str | None
  boot: str | None
  pid_namespace: str | None


def _this_process(pid: int) -> dict[str, Any]:
  return {**_place()._asdict(), 'pid': pid}


@functools.cache
def _place() -> _Place:
  boot = namespace = None
  with contextlib.suppress(OSError):
    file = pathlib.Path('/proc/sys/kernel/random/boot_id')
    boot = file.read_text().strip()
    namespace = os.readlink('/proc/self/ns/pid')
  return _Place(socket.gethostname(), boot, namespace)


def _is_here(values) -> bool:
  """Whether the process of a claim was one of this host."""
  place, pid = _place(), values.get('pid')
  if None in place or not isinstance(pid, int) or pid <= 0:
    return False
  return all(values.get(key) == part for key, part in place._asdict().items())


def _has_ended(pid) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except (PermissionError, OverflowError):
    pass
  return False


def _is_gone(values) -> bool:
  """Whether the process of a claim was one of this host, and has ended."""
  return _is_here(values) and _has_ended(values['pid'])


def _is_alive_here(values) -> bool:
  """Whether the process of a claim is one of this host, and holds it."""
  held = values.get('released') is not True
  return held and _is_here(values) and not _has_ended(values['pid'])
