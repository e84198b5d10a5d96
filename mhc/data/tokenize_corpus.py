"""Documents to a token folder, in one pass over files of any size."""

from collections.abc import Iterator
import hashlib
import itertools
import pathlib
from typing import Any

from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.data import token_dataset
from mhc.data import token_file
from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import console

# Documents tokenised together; a corpus of fewer is split as a whole.
BATCH = 512
VOCABULARY_BYTES = 100_000_000


def prepare(
  path: str, out: pathlib.Path, tokenizer: str, on_damage: str = 'stop'
) -> dict[str, Any]:
  """Tokenises the text at `path` into the folder `out`; returns its index.

  Args:
    path: file, folder or pattern of files that `documents` reads; '' for the
      standard library.
    out: an empty or new folder, or one that an earlier call left incomplete.
    tokenizer: 'bytes', a tokenizer.json, or 'train:N' to learn a byte-level
      BPE vocabulary of N tokens from the first 100 MB.
    on_damage: as `DataConfig.on_damage`; the index counts what was skipped.

  Exact copies are dropped; the split is that of `documents`.

  Raises:
    OSError, ValueError: unusable files, tokenizer or folder.
  """
  files = documents_lib.files(path) if path else {}
  total = sum(token_file.size_of(file) for file in files.values())
  vocabulary = _vocabulary(files, total, tokenizer, on_damage)
  log = corruption.SkipLog(on_damage)
  tokens = token_dataset.Writer(out, vocabulary)
  with console.byte_bar(total, 'tokenise') as bar:
    documents = _distinct(_read(files, bar.update, log))
    first = list(itertools.islice(documents, BATCH))
    if not first:
      why = log.summary() or 'every file is empty'
      raise ValueError(f'{path!r} holds no text: {why}')
    if len(first) < BATCH:
      # Few enough to give both sides some.
      for side, part in zip(
        token_dataset.SIDES,
        documents_lib.split(first, log.names),
        strict=True,
      ):
        if part:
          tokens.add(side, (document.text for document in part))
    else:
      rest = itertools.batched(documents, BATCH)
      for batch in itertools.chain([first], rest):
        for side, heldout in zip(
          token_dataset.SIDES, (False, True), strict=True
        ):
          part = [
            document.text
            for document in batch
            if documents_lib.is_held_out(document.name) == heldout
          ]
          if part:
            tokens.add(side, part)
  if log.count:
    console.print_line(log.summary())
  return tokens.close(path or "Python's standard library", log.count)


def _vocabulary(files, total, tokenizer, on_damage):
  kind, _, number = tokenizer.partition(':')
  if kind != 'train':
    return tokenizer_lib.load(tokenizer)
  if not number.isdigit() or int(number) < 258:
    raise ValueError(
      f'tokenizer={tokenizer!r}: train:N needs the number of tokens, 258 or '
      'more, such as train:32768'
    )
  tokenizer_lib.library()  # before a bar is drawn
  with console.byte_bar(min(total, VOCABULARY_BYTES), 'learn words') as bar:
    return tokenizer_lib.BPE.train(
      _sample(_read(files, bar.update, corruption.SkipLog(on_damage))),
      int(number),
    )


def _sample(documents):
  size = 0
  for document in documents:
    yield document.text
    size += len(document.text)
    if size >= VOCABULARY_BYTES:
      return


def _read(files, progress, log) -> Iterator[documents_lib.Document]:
  """Yields documents of the files or, without any, the standard library's."""
  if not files:
    for document in documents_lib.standard_library():
      yield document
      progress(len(document.text))
  for name, file in files.items():
    for document, size in documents_lib.read(name, file, log):
      yield document
      progress(size)


def _distinct(documents):
  """Drops empty documents and exact copies; the first one stays."""
  seen = set()
  for document in documents:
    digest = hashlib.sha1(document.text).digest()
    if document.text.strip() and digest not in seen:
      seen.add(digest)
      yield document
