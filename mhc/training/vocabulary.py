"""The vocabulary of a run, kept in its work directory from the start.

    tokenizer.json      a BPE vocabulary
    tokenizer.unknown   none: the tokens came from elsewhere, without one
    neither             bytes

Whoever reads text for a run reads it by this vocabulary.
"""

import pathlib

from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import files

TOKENIZER, UNKNOWN = 'tokenizer.json', 'tokenizer.unknown'


def keep(workdir: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer | None):
  """Keeps the vocabulary of a run that starts or goes on; None if unknown.

  Raises:
    ValueError: the run has begun with another one.
  """
  if tokenizer is None:
    if not (workdir / TOKENIZER).exists():
      files.replace(workdir / UNKNOWN, 'token files without a vocabulary\n')
      return
  elif tokenizer.name == 'bytes':
    if not any((workdir / name).exists() for name in (TOKENIZER, UNKNOWN)):
      return
  elif not (workdir / UNKNOWN).exists():
    text = tokenizer.description
    if not (workdir / TOKENIZER).exists():
      files.replace(workdir / TOKENIZER, text)
    if (workdir / TOKENIZER).read_text() == text:
      return
  raise ValueError(
    f'{workdir} holds a run on another vocabulary than data.path now has: give '
    'the text that it was started with, or another --workdir'
  )


def of(workdir: pathlib.Path) -> tokenizer_lib.Tokenizer | None:
  """The vocabulary of a run; None if it is unknown."""
  if (workdir / UNKNOWN).exists():
    return None
  file = workdir / TOKENIZER
  return tokenizer_lib.load(file if file.exists() else 'bytes')
