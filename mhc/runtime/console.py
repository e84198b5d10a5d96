"""Console output of a run: lines and a progress bar.

They go to stderr; in a notebook to stdout, whose cells show it in black, and
the bar is a widget if ipywidgets is installed. What cannot be said, because the
reader of a pipe is gone or the disk of a log is full, is not said: no work is
lost for it.
"""

import contextlib
import importlib.util
import io
import os
import re
import sys
from typing import TextIO

import tqdm


def progress_bar(
  total: int, done: int, label: str, shown: bool = True
) -> tqdm.tqdm:
  """A bar of steps with time left; without a terminal, a line every 15 s."""
  return _bar(
    disable=not shown,
    total=total,
    initial=done,
    desc=label,
    unit='step',
    bar_format='{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} '
    '[{elapsed}<{remaining}]{postfix}',
  )


def share_bar() -> tqdm.tqdm:
  """A bar of a share of work with time left; `n` is set to it, up to 1."""
  return _bar(
    total=1,
    bar_format='{desc} {percentage:3.0f}%|{bar:24}| [{elapsed}<{remaining}]',
  )


def byte_bar(total: int, label: str) -> tqdm.tqdm:
  """A bar of bytes with time left; `total` 0 for unknown."""
  return _bar(total=total or None, desc=label, unit='B', unit_scale=True)


def print_line(text: str):
  """Prints a line, above the progress bar."""
  # In one write, so that lines of other processes do not interleave.
  tqdm.tqdm.write(f'{text}\n', file=_stream(), end='')


def is_live() -> bool:
  """Whether a bar replaces itself: in a terminal and in a notebook."""
  return in_notebook() or sys.stderr.isatty()


def in_notebook() -> bool:
  """Whether this process runs the cells of a notebook."""
  ipython = sys.modules.get('IPython')
  shell = ipython and ipython.get_ipython()
  return bool(shell) and 'IPKernelApp' in shell.config


def _stream():
  return sys.stdout if in_notebook() else sys.stderr


def _bar(**options):
  live = is_live()
  often = {'mininterval': 0.2, 'maxinterval': 0.5}
  if in_notebook() and importlib.util.find_spec('ipywidgets'):
    # Imported here, since it needs a notebook.
    from tqdm import notebook

    if 'bar_format' in options:  # the widget has its own width
      options['bar_format'] = re.sub(
        r'\{bar:\d+\}', '{bar}', options['bar_format']
      )
    return notebook.tqdm(**options, **often)
  return tqdm.tqdm(
    **options,
    **(often if live else {'mininterval': 15, 'maxinterval': 30}),
    dynamic_ncols=sys.stderr.isatty(),
    file=_stream() if live else _LogStream(),
    ncols=None if sys.stderr.isatty() else 110,
  )


def never_fail():
  """Makes the standard streams drop what they cannot write."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:  # closed: the next file that is opened would become it
      os.open(os.devnull, os.O_RDWR)
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None or stream.closed:  # as after `2>&-`
      stream = open(os.devnull, 'w')  # noqa: SIM115, for the process's life
    if not isinstance(stream, _Heedless):
      setattr(sys, name, _Heedless(stream))


class _Heedless(io.TextIOBase):
  """A stream of text whose writes never fail."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError, ValueError):
      self._stream.write(text)
    return len(text)

  def flush(self):
    try:
      self._stream.flush()
    except (OSError, ValueError):
      self._drop_buffered()

  def isatty(self) -> bool:
    with contextlib.suppress(OSError, ValueError):
      return self._stream.isatty()
    return False

  def fileno(self) -> int:
    return self._stream.fileno()

  @property
  def encoding(self) -> str:
    return self._stream.encoding

  @property
  def errors(self) -> str | None:
    return self._stream.errors

  @property
  def buffer(self):
    return self._stream.buffer

  def _drop_buffered(self):
    """Gives what is buffered to nobody: it would fail again at the exit."""
    with contextlib.suppress(OSError, ValueError):
      number = self._stream.fileno()
      kept, nobody = os.dup(number), os.open(os.devnull, os.O_WRONLY)
      try:
        os.dup2(nobody, number)
        self._stream.flush()
      finally:
        os.dup2(kept, number)
        os.close(kept)
        os.close(nobody)


class _LogStream:
  """Stderr as a log: a carriage return starts a new line."""

  def write(self, text: str):
    sys.stderr.write(text.replace('\r', '\n'))

  def flush(self):
    sys.stderr.flush()
