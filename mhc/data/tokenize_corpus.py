"""Documents to a token folder, in one pass over files of any size."""

from collections.abc import Iterator
import functools
import hashlib
import itertools
import pathlib
from typing import Any

from mhc.data import corpus_files
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
  path: str,
  out: pathlib.Path,
  tokenizer: str,
  on_damage: str = 'stop',
  text_field: str = documents_lib.TEXT,
) -> dict[str, Any]:
  """Tokenises the text at `path` into the folder `out`; returns its index.

  Args:
    path: file, folder or pattern of files that `documents` reads; '' for the
      standard library.
    out: an empty or new folder, or one that an earlier call left incomplete.
    tokenizer: 'bytes', a tokenizer.json, or 'train:N' to learn a byte-level
      BPE vocabulary of N tokens from the first 100 MB.
    on_damage: as `DataConfig.on_damage`; the index counts what was skipped.
    text_field: of records, that which holds the text.

  Exact copies are dropped; the split is that of `documents`.

  Raises:
    OSError, ValueError: unusable files, tokenizer or folder.
  """
  files = corpus_files.find(path) if path else None
  total = sum(map(token_file.size_of, files.files.values())) if files else 0
  if files and files.summary():
    console.print_line(f'{path}: {files.summary()}')
  source = functools.partial(_read, files, text_field)
  vocabulary = _vocabulary(source, total, tokenizer, on_damage)
  log = corruption.SkipLog(on_damage)
  tokens = token_dataset.Writer(out, vocabulary)
  with console.byte_bar(total, 'tokenise') as bar:
    documents = _distinct(source(log, bar.update))
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
            if _is_held_out(document) == heldout
          ]
          if part:
            tokens.add(side, part)
  if log.count:
    console.print_line(log.summary())
  if vocabulary.num_normalized:
    console.print_line(
      f'{vocabulary.num_normalized:,} documents were changed by the normalizer '
      f'of {tokenizer}: losses are those of what it made of them'
    )
  return tokens.close(path or "Python's standard library", log.count)


def _is_held_out(document):
  if document.side:
    return document.side == 'heldout'
  return documents_lib.is_held_out(document.name)


def _vocabulary(source, total, tokenizer, on_damage):
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
      _sample(source(corruption.SkipLog(on_damage), bar.update)),
      int(number),
    )


def _sample(documents):
  """Texts of the training side, about `VOCABULARY_BYTES` of them."""
  size = 0
  for document in documents:
    if document.side == 'heldout':
      continue
    yield document.text
    size += len(document.text)
    if size >= VOCABULARY_BYTES:
      return


def _read(files, text_field, log, progress) -> Iterator[documents_lib.Document]:
  """Yields documents of the files or, without any, the standard library's."""
  if files:
    yield from documents_lib.read_all(files, log, text_field, progress)
    return
  for document in documents_lib.standard_library():
    yield document
    progress(len(document.text))


def _distinct(documents):
  """Drops empty documents and exact copies; the first one stays."""
  seen = set()
  for document in documents:
    digest = hashlib.sha1(document.text).digest()
    if document.text.strip() and digest not in seen:
      seen.add(digest)
      yield document
