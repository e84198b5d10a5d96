"""What a person sees while a run goes on: lines and a progress bar."""

import sys

import tqdm


def progress_bar(
  total: int, done: int, label: str, shown: bool = True
) -> tqdm.tqdm:
  """Steps with time left; one line every 15 s where there is no terminal."""
  return _bar(
    disable=not shown,
    total=total,
    initial=done,
    desc=label,
    unit='step',
    bar_format='{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} '
    '[{elapsed}<{remaining}]{postfix}',
  )


def byte_bar(total: int, label: str) -> tqdm.tqdm:
  """Bytes of files with time left; `total` 0 for unknown."""
  return _bar(total=total or None, desc=label, unit='B', unit_scale=True)


def print_line(text: str):
  """Prints a line on stderr, above the progress bar."""
  # In one piece, which other processes' lines do not fall into.
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
  """Stderr as a log: what would overwrite a line starts a new one."""

  def write(self, text: str):
    sys.stderr.write(text.replace('\r', '\n'))

  def flush(self):
    sys.stderr.flush()
