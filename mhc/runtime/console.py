"""Console output of a run on stderr: lines and a progress bar."""

import sys

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
  """A bar of a share of work with time left; `n` and `total` are set later."""
  return _bar(
    total=1,
    bar_format='{desc} {percentage:3.0f}%|{bar:24}| [{elapsed}<{remaining}]',
  )


def byte_bar(total: int, label: str) -> tqdm.tqdm:
  """A bar of bytes with time left; `total` 0 for unknown."""
  return _bar(total=total or None, desc=label, unit='B', unit_scale=True)


def print_line(text: str):
  """Prints a line on stderr, above the progress bar."""
  # In one write, so that lines of other processes do not interleave.
  tqdm.tqdm.write(f'{text}\n', file=sys.stderr, end='')


def _bar(**options) -> tqdm.tqdm:
  terminal = sys.stderr.isatty()
  return tqdm.tqdm(
    **options,
    mininterval=0.2 if terminal else 15,
    maxinterval=0.5 if terminal else 30,
    dynamic_ncols=terminal,
    file=sys.stderr if terminal else _LogStream(),
    ncols=None if terminal else 110,
  )


class _LogStream:
  """Stderr as a log: a carriage return starts a new line."""

  def write(self, text: str):
    sys.stderr.write(text.replace('\r', '\n'))

  def flush(self):
    sys.stderr.flush()
