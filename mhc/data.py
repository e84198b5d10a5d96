"""Text files to batches of token rows.

A corpus is a list of documents, one a file. About one document in twenty is
held out, chosen by a hash of its name, so the split depends neither on order
nor on what else is in the folder. The documents of each side are tokenised,
joined and cut into rows of `seq_len + 1` tokens that overlap by one: inputs
are all but the last, targets all but the first. Training rows come in an order
that is a function of the seed and the step alone.
"""

import dataclasses
import functools
import glob
import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

import grain
import numpy as np

from mhc import config as config_lib
from mhc import tokenizer


class Document(NamedTuple):
  name: str
  text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Token streams of both sides, uint16, and what they were made from."""

  name: str
  train: np.ndarray
  heldout: np.ndarray
  num_documents: int
  num_heldout_documents: int
  num_bytes: int
  sha256: str  # of all documents, in order of name

  def summary(self) -> dict[str, str | int]:
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in ('train', 'heldout')
    } | {'train_tokens': len(self.train), 'heldout_tokens': len(self.heldout)}


@functools.lru_cache(maxsize=1)
def load(path: str) -> Corpus:
  """Reads, splits and tokenises the text at `path` (see `DataConfig.path`).

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: no text in it, or a file that is not UTF-8.
  """
  if path:
    name, documents = path, _read(path)
  else:
    name, documents = "Python's standard library", _standard_library()
  documents = sorted(_distinct(documents))
  if not documents:
    raise ValueError(f'data.path={path!r} holds no text: every file is empty')
  train, heldout = _split(documents)
  digest = hashlib.sha256()
  for document in documents:
    digest.update(document.text)
  return Corpus(
    name=name,
    train=tokenizer.encode([d.text for d in train]),
    heldout=tokenizer.encode([d.text for d in heldout]),
    num_documents=len(documents),
    num_heldout_documents=len(heldout),
    num_bytes=sum(len(d.text) for d in documents),
    sha256=digest.hexdigest(),
  )


class Rows:
  """Random access to the rows of a token stream, int32 [seq_len + 1] each."""

  def __init__(self, tokens: np.ndarray, seq_len: int, side: str):
    if len(tokens) <= seq_len:
      raise ValueError(
        f'data.seq_len={seq_len} needs more than {len(tokens)} tokens of '
        f'{side} text: shorten the rows or bring more text'
      )
    self._tokens = tokens
    self._seq_len = seq_len

  def __len__(self) -> int:
    return (len(self._tokens) - 1) // self._seq_len

  def __getitem__(self, index: int) -> np.ndarray:
    start = index * self._seq_len
    return self._tokens[start : start + self._seq_len + 1].astype(np.int32)


def train_batches(
  corpus: Corpus, config: config_lib.DataConfig, seed: int
) -> grain.DatasetIterator:
  """Endless int32 [batch_size, seq_len + 1]; its state is the batch's number.

  Every epoch is shuffled anew.
  """
  rows = Rows(corpus.train, config.seq_len, 'training')
  dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
  # Slicing an array is cheaper than handing it to a thread.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(dataset.batch(config.batch_size).to_iter_dataset(options))


def heldout_rows(
  corpus: Corpus, seq_len: int, num_rows: int | None
) -> np.ndarray:
  """Rows spread evenly over the held-out text, int32 [rows, seq_len + 1].

  `num_rows` of them, or all for None and where the text is shorter.
  """
  rows = Rows(corpus.heldout, seq_len, 'held-out')
  count = len(rows) if num_rows is None else min(num_rows, len(rows))
  indices = np.arange(count) * len(rows) // count
  return np.stack([rows[index] for index in indices.tolist()])


def _read(path: str) -> list[Document]:
  root = pathlib.Path(path)
  if root.is_file():
    files = {root.name: root}
  elif root.is_dir():
    files = {
      str(file.relative_to(root)): file
      for file in root.rglob('*')
      if not any(p.startswith('.') for p in file.relative_to(root).parts)
    }
  else:
    files = {
      name: pathlib.Path(name) for name in glob.glob(path, recursive=True)
    }
  files = {name: file for name, file in files.items() if file.is_file()}
  if not files:
    raise FileNotFoundError(
      f'data.path={path!r} names no file: give a text file, a folder of them '
      "or a quoted pattern such as 'texts/**/*.txt'"
    )
  return [Document(name, _utf8(file)) for name, file in files.items()]


def _utf8(file: pathlib.Path) -> bytes:
  text = file.read_bytes()
  try:
    text.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{file} is not UTF-8 text (byte {error.start}): convert it with iconv, '
      "or leave it out with a pattern such as data.path='texts/**/*.txt'"
    ) from None
  return text


def _standard_library() -> list[Document]:
  """The running interpreter's own modules, without tests and odd files."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
  documents = []
  for file in root.rglob('*.py'):
    name = file.relative_to(root)
    if skipped & set(name.parts):
      continue
    text = file.read_bytes()
    if _clean(text):
      documents.append(Document(str(name), text))
  return documents


def _clean(text: bytes) -> bool:
  """UTF-8 of 200 B to 200 kB, no NUL, no line above 2,000 bytes."""
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  longest = max(map(len, text.split(b'\n')))
  return 200 <= len(text) <= 200_000 and b'\0' not in text and longest <= 2_000


def _distinct(documents: list[Document]) -> list[Document]:
  """Without empty documents and exact copies; the first name wins."""
  first = {d.text: d for d in sorted(documents, reverse=True) if d.text.strip()}
  return list(first.values())


def _split(
  documents: list[Document],
) -> tuple[list[Document], list[Document]]:
  """(train, held out); of a single document the last twentieth is held out."""
  if len(documents) == 1:
    name, text = documents[0]
    cut = len(text) - max(1, len(text) // 20)
    return [Document(name, text[:cut])], [Document(name, text[cut:])]
  hashes = {d.name: _hash(d.name) for d in documents}
  heldout = {name for name, value in hashes.items() if value % 20 == 0}
  if not heldout or len(heldout) == len(documents):
    heldout = {min(hashes, key=hashes.get)}
  return (
    [d for d in documents if d.name not in heldout],
    [d for d in documents if d.name in heldout],
  )


def _hash(name: str) -> int:
  return int(hashlib.sha1(name.encode()).hexdigest(), 16)
