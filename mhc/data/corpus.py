"""The text of one path as two streams of tokens, for training and held out.

It is read from documents and tokenised, by default to bytes, or from a token
folder written by launch/prepare_data.py.
"""

import dataclasses
import hashlib
import os

import numpy as np

from mhc.config.task import TaskConfig
from mhc.data import corpus_files
from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.data import questions
from mhc.data import sources
from mhc.data import token_dataset
from mhc.data import token_file
from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import console
from mhc.runtime import paths


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The token streams of both sides, in shards, and their origin."""

  name: str
  train: tuple[token_file.Tokens | questions.Rows, ...]
  heldout: tuple[token_file.Tokens | questions.Rows, ...]
  tokenizer: tokenizer_lib.Tokenizer | None  # None if unknown
  num_documents: int
  num_heldout_documents: int
  num_bytes: int
  sha256: str  # of all documents, in the order of the source
  num_skipped_before: int = 0  # when it was tokenised
  left_out: str = ''  # one line of the files that are not read, and why
  made: str = ''  # what its rows are, which are made and not read
  log: corruption.SkipLog = dataclasses.field(
    default_factory=corruption.SkipLog
  )

  @property
  def num_skipped(self) -> int:
    """Number of corrupted records, blocks and files that were skipped.

    A block of tokens counts once this process has read it.
    """
    return self.num_skipped_before + self.log.count

  @property
  def num_train_tokens(self) -> int:
    return sum(map(len, self.train))

  @property
  def num_heldout_tokens(self) -> int:
    return sum(map(len, self.heldout))

  @property
  def in_memory(self) -> bool:
    """Whether no row has to be read from a file."""
    shards = (*self.train, *self.heldout)
    return all(isinstance(shard, np.ndarray) for shard in shards)

  def line(self) -> str:
    """What was found, in a line for the start of a run."""
    if self.made:
      return f'{self.name}: {self.made}'
    documents = 'token files of others'
    if self.num_documents:
      documents = (
        f'{self.num_documents:,} documents of {self.num_bytes:,} bytes, '
        f'{self.num_heldout_documents:,} of them held out'
      )
    vocabulary = 'a vocabulary that is unknown'
    if self.tokenizer:
      vocabulary = f'{self.tokenizer.name} ({self.tokenizer.num_tokens:,})'
    return (
      f'{self.name}: {documents}; {self.num_train_tokens:,} tokens of '
      f'{vocabulary} to train on, {self.num_heldout_tokens:,} held out'
      + f'; {self.left_out}'
      * bool(self.left_out)
    )

  def summary(self) -> dict[str, str | int]:
    return {
      'name': self.name,
      'num_documents': self.num_documents,
      'num_heldout_documents': self.num_heldout_documents,
      'num_skipped': self.num_skipped,
      'num_bytes': self.num_bytes,
      'sha256': self.sha256,
      'tokenizer': self.tokenizer.name if self.tokenizer else 'unknown',
      'train_tokens': self.num_train_tokens,
      'heldout_tokens': self.num_heldout_tokens,
      **({'made': self.made} if self.made else {}),
    }


def load(
  path: str,
  on_damage: str = 'stop',
  text_field: str = documents_lib.TEXT,
  token_dtype: str = '',
  tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> Corpus:
  """Reads the text or the tokens at `path` (see `DataConfig`).

  Text is tokenised by `tokenizer`, by default to bytes; tokens must be of that
  vocabulary, if one is given and theirs is known.

  Raises:
    FileNotFoundError: nothing is at `path`.
    OSError: it cannot be read; names `data.path`.
    ValueError: it holds no text; something is corrupted or not UTF-8 and
      `on_damage` is 'stop', or nothing else remains; another vocabulary.
  """
  if path.startswith(sources.HUB):
    raise ValueError(
      f'data.path={path!r} is a stream: first make a token folder of it, '
      f"launch/prepare_data.py --path='{path}' --out=FOLDER"
    )
  path = paths.given(path, 'data.path')
  try:
    log = corruption.SkipLog(on_damage)
    if is_tokens(path):
      return _from_tokens(paths.path(path), log, token_dtype, tokenizer)
    return _from_text(path, log, text_field, tokenizer or tokenizer_lib.Bytes())
  except OSError as error:
    if 'data.path' in str(error):
      raise
    raise type(error)(
      f'data.path={path!r} cannot be read ({error}): give a file, a folder or '
      'a pattern'
    ) from error


def of_task(task: TaskConfig, seq_len: int) -> Corpus:
  """The rows of a task, as if they were text that is kept somewhere."""
  train, heldout = questions.NUM_TRAIN, questions.NUM_HELDOUT
  return Corpus(
    name=task.name,
    train=(questions.Rows(task, 'train', seq_len),),
    heldout=(questions.Rows(task, 'heldout', seq_len),),
    tokenizer=tokenizer_lib.Bytes(),
    num_documents=train + heldout,
    num_heldout_documents=heldout,
    num_bytes=(train + heldout) * task.num_bytes,
    sha256=questions.sha256(task, seq_len),
    made=(
      f'rows of {task.num_bytes} bytes, {task.num_answer_bytes} of them '
      f'answers; levels {", ".join(map(str, task.ladder))}, size {task.symbols}'
    ),
  )


def is_tokens(path: str) -> bool:
  """Whether `path` is a token folder; otherwise it is text."""
  path = os.path.expanduser(path)
  return bool(path) and token_dataset.holds(paths.path(path))


def documents_at(
  path: str, log: corruption.SkipLog, text_field: str = documents_lib.TEXT
) -> tuple[list[documents_lib.Document], str]:
  """The distinct documents at a path, '' for Python's, and what is left out."""
  if not path:
    return documents_lib.distinct(documents_lib.standard_library()), ''
  files = corpus_files.find(path)
  found = list(documents_lib.read_all(files, log, text_field))
  return documents_lib.distinct(found), files.summary()


def _from_text(path, log, text_field, tokenizer) -> Corpus:
  documents, left_out = documents_at(path, log, text_field)
  if not documents:
    why = log.summary() or 'every file is empty'
    raise ValueError(f'data.path={path!r} holds no text: {why}')
  sides = documents_lib.split(documents, log.names)
  (train, lost), (heldout, lost_heldout) = (
    _tokenised(side, tokenizer, log) for side in sides
  )
  if log.count:
    console.print_line(log.summary())
  digest = hashlib.sha256()
  for document in documents:
    digest.update(document.text)
  return Corpus(
    name=path or "Python's standard library",
    train=(train,),
    heldout=(heldout,),
    tokenizer=tokenizer,
    num_documents=len(documents) - lost - lost_heldout,
    num_heldout_documents=len(sides[1]) - lost_heldout,
    num_bytes=sum(len(d.text) for d in documents),
    sha256=digest.hexdigest(),
    left_out=left_out,
    num_skipped_before=log.count,
    log=corruption.SkipLog(log.policy),
  )


def _tokenised(documents, tokenizer, log):
  """Tokens of documents, and the number of those that they do not give back.

  These are damage, and left out.
  """
  encoded = tokenizer.encode_each([document.text for document in documents])
  lost = np.flatnonzero(encoded.lengths == 0).tolist()
  for document in (documents[number] for number in lost):
    log.report(f'{document.name}: {tokenizer.lossy(document.text)}')
  return encoded.tokens, len(lost)


def _from_tokens(path, log, token_dtype, tokenizer) -> Corpus:
  folder = token_dataset.read(path, log, token_dtype)
  known = folder.tokenizer
  if tokenizer and known and tokenizer.description != known.description:
    raise ValueError(
      f'data.path={str(path)!r} holds tokens of another vocabulary '
      f'({known.num_tokens:,} tokens of {known.name}) than the run '
      f'({tokenizer.num_tokens:,} of {tokenizer.name}): give text, or prepare '
      "it again by the run's tokenizer.json"
    )
  return Corpus(
    name=folder.index['name'],
    train=folder.train,
    heldout=folder.heldout,
    tokenizer=folder.tokenizer,
    **{
      name: folder.index[name]
      for name in (
        'num_documents',
        'num_heldout_documents',
        'num_bytes',
        'sha256',
      )
    },
    num_skipped_before=folder.index['num_skipped'],
    log=log,
  )


def check_vocabulary(corpus: Corpus, vocab_size: int):
  """Raises ValueError if a token is not below `vocab_size`.

  Without a known tokenizer only the start of each shard is checked; `Rows`
  checks the rest as it is read.
  """
  if corpus.tokenizer is not None:
    largest = corpus.tokenizer.num_tokens - 1
  else:
    largest = max(map(_largest, (*corpus.train, *corpus.heldout)))
  if largest >= vocab_size:
    raise ValueError(
      f'model.vocab_size={vocab_size} is less than the {largest + 1} tokens '
      f'of {corpus.name}: set it to that, or to the next multiple of 128'
    )


def _largest(shard):
  try:
    return int(shard[:10_000_000].max(initial=0))
  except corruption.Skipped:
    return 0
