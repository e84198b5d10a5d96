"""Token folders, written once and then read in any order.

    index.json       format, dtype, tokenizer, origin of the text, digests of
                     the other files; written last, so a folder without it is
                     incomplete
    sources.json     documents and fingerprint of each file that was read
    tokenizer.json   the vocabulary, if it is not bytes
    train-00000.bin, heldout-00000.bin, ...
    train-00000.crc, heldout-00000.crc, ...

The token files are flat little-endian uint16 or uint32; for .crc see
`token_file`, the index has its SHA-256. Such files from elsewhere (nanoGPT's
train.bin and val.bin; also with the 1,024-byte headers of llm.c) are read
without an index; then their vocabulary is unknown, and corruption is detected
by their size only.
"""

from collections.abc import Iterable, Sequence
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from jaxtyping import UInt
import numpy as np

from mhc.data import corruption
from mhc.data import token_file
from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import retry

FORMAT = 'mhc tokens 1'
SIDES = ('train', 'heldout')
SHARD_TOKENS = 100_000_000
UNFINISHED = pathlib.PurePath('parts', 'plan.json')  # see `unfinished`
HEADER_BYTES = 1024
# The first number of llm.c's header, and the type of what follows it.
HEADER_DTYPES = {20240520: 'uint16', 20240801: 'uint32'}
# How much of a file without a header is looked at to tell uint32, and what the
# upper 16 bits of a token are below: no vocabulary has 2^20 tokens.
SAMPLE_BYTES, MOST_UPPER = 2**20, 2**4


def _is(kind):
  return lambda value: type(value) is kind


def _is_list(kind, size=None):
  return lambda value: (
    type(value) is list
    and all(type(item) is kind for item in value)
    and (size is None or len(value) == size)
  )


def _are_counts(value):
  return _is_list(int)(value) and all(0 <= count < 2**48 for count in value)


# Required fields of an index, and their checks.
FIELDS = {
  'name': _is(str),
  'tokenizer': ('bytes', 'tokenizer.json').__contains__,
  'num_tokens': _is(int),
  'dtype': ('uint16', 'uint32').__contains__,
  'num_documents': _is(int),
  'num_heldout_documents': _is(int),
  'num_skipped': _is(int),
  'num_bytes': _is(int),
  'sha256': _is(str),
  **dict.fromkeys(SIDES, _are_counts),
}


class Folder(NamedTuple):
  """Token shards of both sides."""

  train: tuple[token_file.Shard, ...]
  heldout: tuple[token_file.Shard, ...]
  tokenizer: tokenizer_lib.Tokenizer | None
  index: dict[str, Any]


def write_shards(
  path: paths.Path,
  side: str,
  first: int,
  chunks: Iterable[UInt[np.ndarray, '_']],
  *,
  split: bool = False,
) -> list[dict[str, Any]]:
  """Writes tokens as the shard `first` of a side, and describes it.

  The folder is made if it is not there.

  With `split`, as as many as `SHARD_TOKENS` asks for, perhaps none.
  """
  if not paths.in_bucket(path):
    path.mkdir(parents=True, exist_ok=True)
  described = []
  chunks = iter(chunks)
  chunk = next(chunks, None)
  while chunk is not None or (not split and not described):
    stem = path / f'{side}-{first + len(described):05d}'
    count, crcs = 0, token_file.Crcs()
    with files_lib.replacing(stem.with_suffix('.bin')) as file:
      while chunk is not None and not (split and count >= SHARD_TOKENS):
        data = chunk.astype(chunk.dtype.newbyteorder('<')).tobytes()
        crcs.update(data)
        file.write(data)
        count += len(chunk)
        chunk = next(chunks, None)
      crc = crcs.tobytes()
      with files_lib.replacing(stem.with_suffix('.crc')) as file_of_crcs:
        file_of_crcs.write(crc)
    described.append(
      {'tokens': count, 'digest': hashlib.sha256(crc).hexdigest()}
    )
  return described


def index_of(
  path: paths.Path,
  name: str,
  tokenizer: tokenizer_lib.Tokenizer,
  written: Sequence[dict[str, Any]],
  num_skipped: int = 0,
) -> dict[str, Any]:
  """Keeps the vocabulary, and returns the index of what was written.

  Args:
    path: the folder.
    name: of the text.
    tokenizer: its vocabulary.
    written: `side`, `files` (as of `write_shards`), `documents`, `bytes` and
      `sha256` of every bucket in order.
    num_skipped: records and files that were left out.

  Raises:
    ValueError: a side has no text.
  """
  of = {side: [w for w in written if w['side'] == side] for side in SIDES}
  files = {
    side: [file for one in of[side] for file in one['files']] for side in SIDES
  }
  for side in SIDES:
    if not sum(file['tokens'] for file in files[side]):
      raise ValueError(
        f'{name}: no document is in {side!r} (one in twenty is held out, '
        'by its name): give more or smaller documents'
      )
  digests = {side: [file['digest'] for file in files[side]] for side in SIDES}
  vocabulary = 'bytes'
  if tokenizer.name != 'bytes':
    vocabulary = 'tokenizer.json'
    text = tokenizer.description
    files_lib.replace(path / vocabulary, text, shared=True)
    digests[vocabulary] = _sha256(path / vocabulary)
  text = ' '.join(one['sha256'] for one in written)
  return {
    'format': FORMAT,
    'name': name,
    'tokenizer': vocabulary,
    'num_tokens': tokenizer.num_tokens,
    'dtype': np.dtype(tokenizer.dtype).name,
    'num_documents': sum(one['documents'] for one in written),
    'num_heldout_documents': sum(one['documents'] for one in of['heldout']),
    'num_skipped': num_skipped,
    'num_bytes': sum(one['bytes'] for one in written),
    'sha256': hashlib.sha256(text.encode()).hexdigest(),
    **{side: [file['tokens'] for file in files[side]] for side in SIDES},
    'digests': digests,
  }


def write_index(path: paths.Path, index: dict[str, Any]):
  """Writes the index, with which the folder is complete."""
  text = json.dumps(index, indent=2) + '\n'
  files_lib.replace(path / 'index.json', text, shared=True)


def holds(path: paths.Path) -> bool:
  """Whether `path` is a token folder, finished or not."""
  return path.is_dir() and (
    (path / 'index.json').exists()
    or (path / UNFINISHED).exists()
    or any(path.glob('*.bin'))
  )


def read(
  path: paths.Path,
  log: corruption.SkipLog | None = None,
  token_dtype: str = '',
) -> Folder:
  """Opens a token folder; `token_dtype` is that of files without a header.

  Corruption of a token file stops the run or is skipped, by the policy of `log`
  ('stop' by default); the index and the vocabulary must be intact.

  Raises:
    ValueError: the folder is incomplete, corrupted, or of another format.
    OSError: a file cannot be read.
  """
  log = log or corruption.SkipLog()
  if not (path / 'index.json').exists():
    if (path / UNFINISHED).exists():
      raise ValueError(
        f'{path} is not finished: run its launch/prepare_data.py again, which '
        'goes on with it'
      )
    return _foreign(path, log, token_dtype)
  index = read_index(path / 'index.json')
  digests = index.get('digests') or {}
  shards = {
    side: tuple(
      token_file.Shard(
        path / f'{side}-{number:05d}.bin', index['dtype'], 0, count, log, digest
      )
      for number, (count, digest) in enumerate(
        zip(
          index[side], digests.get(side, [None] * len(index[side])), strict=True
        )
      )
    )
    for side in SIDES
  }
  vocabulary = index['tokenizer']
  if vocabulary != 'bytes':
    vocabulary = path / vocabulary
    if digests and _sha256(vocabulary) != digests.get(vocabulary.name):
      raise ValueError(
        f'{vocabulary} does not match its digest: prepare the data again'
      )
  tokenizer = tokenizer_lib.load(vocabulary)
  if tokenizer.num_tokens != index['num_tokens']:
    raise ValueError(
      f'{vocabulary} has {tokenizer.num_tokens} tokens, not the '
      f'{index["num_tokens"]} of {path / "index.json"}: prepare the data again'
    )
  return Folder(**shards, tokenizer=tokenizer, index=index)


def read_index(file: paths.Path) -> dict[str, Any]:
  """Reads an index; raises ValueError if it is damaged."""
  try:
    index = json.loads(retry.with_retries(file.read_bytes, file))
    if not isinstance(index, dict) or index.get('format') != FORMAT:
      raise ValueError(f'not an object whose format is {FORMAT!r}')
    index.setdefault('num_skipped', 0)
    bad = [
      name for name, is_good in FIELDS.items() if not is_good(index.get(name))
    ]
    digests = index.get('digests')  # older folders have none
    for side in SIDES if digests is not None else ():
      if bad or not _is_list(str, len(index[side]))(digests.get(side)):
        bad.append(f'digests of {side}')
    if bad:
      raise ValueError(f'no usable {bad[0]}')
  except (ValueError, AttributeError, RecursionError) as error:
    problem = corruption.one_line(str(error))
    raise ValueError(
      f'{file} is damaged, {problem}: prepare the data again'
    ) from None
  return index


def _foreign(path, log, token_dtype):
  """Opens token files without an index: *val* is held out, the rest trains."""
  found = sorted(path.glob('*.bin'))
  heldout = [file for file in found if 'val' in file.name]
  train = [file for file in found if file not in heldout]
  if not heldout or not train:
    raise ValueError(
      f'{path} has no index.json, and its token files are not a train*.bin and '
      f'a *val*.bin, but {[file.name for file in found]}: give both, or '
      'prepare the data again'
    )
  digest = hashlib.sha256()
  shards = {}
  for side, files in (('train', train), ('heldout', heldout)):
    shards[side] = tuple(
      _foreign_shard(file, log, token_dtype) for file in files
    )
    for file in files:
      text = f'{file.name} {token_file.size_of(file)}'
      digest.update(text.encode(errors='replace'))
  return Folder(
    **shards,
    tokenizer=None,
    index={
      'name': str(path),
      'num_documents': 0,
      'num_heldout_documents': 0,
      'num_skipped': 0,
      'num_bytes': 0,
      'num_tokens': 0,
      'sha256': f'of names and sizes: {digest.hexdigest()}',
    },
  )


def _foreign_shard(file, log, token_dtype):
  size = token_file.size_of(file)
  head = retry.File(file).pread(0, 12) if size >= HEADER_BYTES else b''
  magic, _, count = np.frombuffer(head, '<i4').tolist() or (0, 0, -1)
  if magic in HEADER_DTYPES and count >= 0:
    dtype = HEADER_DTYPES[magic]
    if token_dtype not in ('', dtype):
      raise ValueError(
        f'data.token_dtype={token_dtype!r}, but the header of {file} says '
        f'{dtype}: leave it out'
      )
    return token_file.Shard(file, dtype, HEADER_BYTES, count, log)
  if magic in HEADER_DTYPES or count in [
    (size - HEADER_BYTES) // width for width in (2, 4)
  ]:
    raise ValueError(
      f'{file} is damaged, its header is not that of llm.c: copy it again'
    )
  if not token_dtype and _seems_uint32(file, size):
    raise ValueError(
      f'{file} has no header and seems to hold uint32, for every other 16 bits '
      "are nearly 0: set data.token_dtype='uint32', or 'uint16' if it is not so"
    )
  dtype = np.dtype(token_dtype or 'uint16')
  return token_file.Shard(file, dtype.name, 0, size // dtype.itemsize, log)


def _seems_uint32(file, size):
  """Whether the upper halves of 32 bits are those of a vocabulary's numbers."""
  data = retry.File(file).pread(0, min(size, SAMPLE_BYTES) // 4 * 4)
  low, high = np.frombuffer(data, '<u2').reshape(-1, 2).T
  if size % 4 or len(high) < 16:
    return False
  return high.max() < MOST_UPPER <= low.max()


def _sha256(file):
  return hashlib.sha256(retry.with_retries(file.read_bytes, file)).hexdigest()
