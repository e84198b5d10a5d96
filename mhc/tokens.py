"""Folders of tokens, written once and then read by memory map.

    index.json       format, dtype, tokenizer and what the text was; written
                     last, so a folder without it is not finished
    tokenizer.json   the vocabulary, if it is not bytes
    train-00000.bin, heldout-00000.bin, ...

The token files are flat little-endian uint16 or uint32. Files of that kind from
elsewhere (nanoGPT's train.bin and val.bin; with the 1,024-byte header of llm.c
also) are read without an index; their vocabulary is then unknown.
"""

from collections.abc import Iterable
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mhc import tokenizer as tokenizer_lib
from mhc import writer

FORMAT = 'mhc tokens 1'
SIDES = ('train', 'heldout')
SHARD_TOKENS = 100_000_000
HEADER_BYTES = 1024
HEADER_MAGIC = 20240520


class Folder(NamedTuple):
  """Token shards of both sides, memory-mapped."""

  train: tuple[np.ndarray, ...]
  heldout: tuple[np.ndarray, ...]
  tokenizer: tokenizer_lib.Tokenizer | None
  index: dict[str, Any]


class Writer:
  """Writes a folder of tokens; not finished before `close`."""

  def __init__(self, path: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer):
    path.mkdir(parents=True, exist_ok=True)
    if (path / 'index.json').exists():
      raise ValueError(f'{path} holds tokens already: choose another folder')
    foreign = [f.name for f in path.iterdir() if not _ours(f.name)]
    if foreign:
      raise ValueError(
        f'{path} is not empty ({foreign[0]}): choose another folder'
      )
    for leftover in path.iterdir():
      leftover.unlink()
    self._path, self._tokenizer = path, tokenizer
    self._shards = {side: [] for side in SIDES}
    self._counts = {side: [] for side in SIDES}
    self._digest = hashlib.sha256()
    self._num_bytes = self._num_documents = self._num_heldout = 0

  def add(self, side: str, documents: Iterable[bytes]):
    """Appends documents to 'train' or 'heldout'."""
    documents = list(documents)
    tokens = self._tokenizer.encode_documents(documents)
    for text in documents:
      self._digest.update(text)
      self._num_bytes += len(text)
    self._num_documents += len(documents)
    self._num_heldout += len(documents) * (side == 'heldout')
    counts = self._counts[side]
    if not counts or counts[-1] + len(tokens) > SHARD_TOKENS:
      counts.append(0)
    counts[-1] += len(tokens)
    with self._file(side, len(counts) - 1).open('ab') as file:
      tokens.tofile(file)

  def close(self, name: str) -> dict[str, Any]:
    """Writes the index, once both sides have text, and returns it."""
    for side in SIDES:
      if not sum(self._counts[side]):
        raise ValueError(
          f'no document fell on the side {side!r}: one in twenty is held out '
          'by its name, bring more or smaller documents'
        )
    vocabulary = 'bytes'
    if self._tokenizer.name != 'bytes':
      vocabulary = 'tokenizer.json'
      writer.replace(self._path / vocabulary, self._tokenizer.description)
    index = {
      'format': FORMAT,
      'name': name,
      'tokenizer': vocabulary,
      'num_tokens': self._tokenizer.num_tokens,
      'dtype': np.dtype(self._tokenizer.dtype).name,
      'num_documents': self._num_documents,
      'num_heldout_documents': self._num_heldout,
      'num_bytes': self._num_bytes,
      'sha256': self._digest.hexdigest(),
      **{side: self._counts[side] for side in SIDES},
    }
    text = json.dumps(index, indent=2) + '\n'
    writer.replace(self._path / 'index.json', text)
    return index

  def _file(self, side, number):
    return self._path / f'{side}-{number:05d}.bin'


def holds(path: pathlib.Path) -> bool:
  """Whether a folder is one of tokens."""
  return path.is_dir() and (
    (path / 'index.json').exists() or any(path.glob('*.bin'))
  )


def read(path: pathlib.Path) -> Folder:
  """Maps a folder's tokens.

  Raises:
    ValueError: not finished, damaged, or of another format.
  """
  if not (path / 'index.json').exists():
    return _foreign(path)
  try:
    index = json.loads((path / 'index.json').read_text())
    if index.get('format') != FORMAT:
      raise ValueError(f'format is {index.get("format")!r}, not {FORMAT!r}')
  except ValueError as error:
    raise ValueError(f'{path / "index.json"}: {error}') from None
  shards = {
    side: tuple(
      _map(path / f'{side}-{number:05d}.bin', index['dtype'], 0, count)
      for number, count in enumerate(index[side])
    )
    for side in SIDES
  }
  vocabulary = index['tokenizer']
  if vocabulary != 'bytes':
    vocabulary = path / vocabulary
  return Folder(**shards, tokenizer=tokenizer_lib.load(vocabulary), index=index)


def _foreign(path):
  """Files by their names: *val* is held out, everything else for training."""
  found = sorted(path.glob('*.bin'))
  heldout = [file for file in found if 'val' in file.name]
  train = [file for file in found if file not in heldout]
  if not heldout or not train:
    raise ValueError(
      f'{path} has no index.json, and its token files are not a train*.bin and '
      f'a *val*.bin: {[file.name for file in found]}'
    )
  digest = hashlib.sha256()
  shards = {}
  for side, files in (('train', train), ('heldout', heldout)):
    shards[side] = tuple(_map_foreign(file) for file in files)
    for file in files:
      digest.update(f'{file.name} {file.stat().st_size}'.encode())
  return Folder(
    **shards,
    tokenizer=None,
    index={
      'name': str(path),
      'num_documents': 0,
      'num_heldout_documents': 0,
      'num_bytes': 0,
      'num_tokens': 0,
      'sha256': f'of names and sizes: {digest.hexdigest()}',
    },
  )


def _map_foreign(file):
  head = np.fromfile(file, np.int32, 3)
  offset = 0
  if len(head) == 3 and head[0] == HEADER_MAGIC:
    offset = HEADER_BYTES
  count = (file.stat().st_size - offset) // 2
  if offset and count != head[2]:
    raise ValueError(f'{file} is damaged: {count} tokens of {head[2]}')
  return _map(file, 'uint16', offset, count)


def _map(file, dtype, offset, count):
  size = file.stat().st_size if file.exists() else 0
  want = offset + count * np.dtype(dtype).itemsize
  if size != want:
    raise ValueError(
      f'{file} has {size} bytes, its index says {want}: prepare the data again'
    )
  return np.memmap(file, dtype, 'r', offset, count)


def _ours(name):
  return name == 'tokenizer.json' or (
    name.endswith(('.bin', '.partial')) and name.startswith((*SIDES, 'index'))
  )
