"""Policy for corrupted data: stop the run with a one-line error, or skip it.

The log counts what is skipped and keeps the first few places and reasons.
"""

from collections.abc import Iterable
import errno
import itertools
import threading

SHOWN = 3
HINT = (
  "repair it or make it again, or set data.on_damage='skip' (prepare_data.py "
  '--on_damage=skip) to leave out what is damaged'
)

# Limit on the kept names of skipped documents, for `documents.split`: of more
# documents, some are on either side in any case.
MANY_NAMES = 1000

# Errors that concern one file; EIO is raised for bad sectors, though also for a
# file system that is gone.
_FILE_ERRNOS = {
  errno.EACCES,
  errno.EBADMSG,
  errno.EIO,
  errno.EISDIR,
  errno.ELOOP,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EPERM,
}


class Skipped(Exception):
  """Raised for data that is corrupted and skipped."""


class SkipLog:
  """Counts what is skipped; with policy 'stop' it raises instead."""

  def __init__(self, policy: str = 'stop'):
    self.policy = policy
    self.count = 0
    self.names: list[str] = []
    self.blocks: set[str] = set()
    self._places = []
    self._lock = threading.Lock()

  def report(
    self, problem: str, names: Iterable[str] = (), block: str | None = None
  ):
    """Records a problem with the documents of these names, or with a block.

    Raises:
      ValueError: the policy is 'stop'.
    """
    problem = one_line(problem)
    if self.policy == 'stop':
      raise ValueError(f'{problem}; {HINT}')
    with self._lock:
      self.count += 1
      if block is not None:
        self.blocks.add(block)
      if len(self._places) < SHOWN:
        self._places.append(problem)
      room = MANY_NAMES - len(self.names)
      self.names.extend(itertools.islice(names, max(0, room)))

  def forget(self):
    """Counts from here on."""
    self.count = 0
    self.names.clear()
    self._places.clear()

  def summary(self) -> str:
    """Returns one line about what was skipped, '' for nothing."""
    if not self.count:
      return ''
    more = self.count - len(self._places)
    return (
      f'DAMAGED DATA: {self.count:,} left out: {"; ".join(self._places)}'
      + f'; and {more:,} more' * bool(more)
    )


def reason(error: BaseException) -> str:
  """Returns in one line why a file cannot be used.

  Raises:
    OSError: `error` itself, if it does not concern this file: a file system
      that is gone, no memory.
  """
  if isinstance(error, OSError):
    if error.errno is not None and error.errno not in _FILE_ERRNOS:
      raise error
    return one_line(error.strerror or str(error))
  return one_line(str(error) or type(error).__name__)


def one_line(text: str, most: int = 400) -> str:
  text = ' '.join(text.split())
  return text if len(text) <= most else f'{text[:most]}...'
