"""The vocabulary of a run, kept in its work directory from the start.

    tokenizer.json      a BPE vocabulary
    tokenizer.unknown   none: the tokens came from elsewhere, without one
    neither             bytes

Whoever reads text for a run reads it by this vocabulary.
"""

from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import files
from mhc.runtime import paths

TOKENIZER, UNKNOWN = 'tokenizer.json', 'tokenizer.unknown'


def keep(workdir: paths.Path, tokenizer: tokenizer_lib.Tokenizer | None):
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
    if (workdir / TOKENIZER).read_bytes() == text.encode():
      return
  raise ValueError(
    f'{workdir} holds a run on another vocabulary than data.path now has: give '
    'the text that it was started with, or another --workdir'
  )


def write(folder: paths.Path, tokenizer: tokenizer_lib.Tokenizer):
  """Writes a known vocabulary to a new folder."""
  if tokenizer.name != 'bytes':
    files.replace(folder / TOKENIZER, tokenizer.description)


def of(
  workdir: paths.Path, given: str | None = None
) -> tokenizer_lib.Tokenizer | None:
  """The vocabulary of a run; None if it is unknown.

  `given`, a tokenizer.json or 'bytes', is taken for one that is unknown.

  Raises:
    ValueError: the run has one of its own, and another is given.
  """
  if (workdir / UNKNOWN).exists():
    return None if given is None else tokenizer_lib.load(given)
  if given is not None:
    raise ValueError(
      f'--tokenizer={given}, but {workdir} knows its vocabulary: leave it out'
    )
  file = workdir / TOKENIZER
  return tokenizer_lib.load(file if file.exists() else 'bytes')


def required(
  workdir: paths.Path, given: str | None = None
) -> tokenizer_lib.Tokenizer:
  """The vocabulary of a run, as `of`.

  Raises:
    ValueError: it is unknown.
  """
  found = of(workdir, given)
  if found is None:
    raise ValueError(
      f'the vocabulary of {workdir} is unknown, its tokens came without one: '
      'give it, --tokenizer=TOKENIZER_JSON'
    )
  return found
