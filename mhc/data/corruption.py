"""What to do with damaged data: end the run in one line, or leave it out.

What is left out is counted, with the first few places and reasons.
"""

from collections.abc import Iterable
import errno
import itertools

SHOWN = 3
HINT = (
  "repair it or make it again, or set data.on_damage='skip' (prepare_data.py "
  '--on_damage=skip) to leave out what is damaged'
)

# Names that are kept of what was left out, see `documents.split`: among more
# of them some fall on either side.
MANY_NAMES = 1000

# Of the errors of a file system, those that are about this file; EIO is what
# bad sectors give, though also a file system that is gone.
_OF_THE_FILE = {
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
  """What was asked for is damaged and left out."""


class SkipLog:
  """What was left out; with policy 'stop' nothing ever is."""

  def __init__(self, policy: str = 'stop'):
    self.policy = policy
    self.count = 0
    self.names: list[str] = []
    self._places = []

  def report(self, problem: str, names: Iterable[str] = ()):
    """Takes note of a problem with the documents of these names.

    Raises:
      ValueError: the policy is 'stop'.
    """
    problem = one_line(problem)
    if self.policy == 'stop':
      raise ValueError(f'{problem}; {HINT}')
    self.count += 1
    if len(self._places) < SHOWN:
      self._places.append(problem)
    room = MANY_NAMES - len(self.names)
    self.names.extend(itertools.islice(names, max(0, room)))

  def summary(self) -> str:
    """Of what was left out, '' for nothing."""
    if not self.count:
      return ''
    more = self.count - len(self._places)
    return (
      f'DAMAGED DATA: {self.count:,} left out: {"; ".join(self._places)}'
      + f'; and {more:,} more' * bool(more)
    )


def reason(error: BaseException) -> str:
  """Why a file cannot be used, in a line.

  Raises:
    OSError: the error itself, if it is not about the file: a file system that
      is gone, no memory.
  """
  if isinstance(error, OSError):
    if error.errno is not None and error.errno not in _OF_THE_FILE:
      raise error
    return one_line(error.strerror or str(error))
  return one_line(str(error) or type(error).__name__)


def one_line(text: str, most: int = 400) -> str:
  text = ' '.join(text.split())
  return text if len(text) <= most else f'{text[:most]}...'
