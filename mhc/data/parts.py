"""Parts of a corpus that is being prepared: tokenised documents in segments.

A document is placed by the digest of its text: its bucket, which becomes a
shard of the token folder, and its place in the bucket. So the order of a
folder is random but depends on nothing else than its texts, and exact copies
meet in one bucket. A part is a run of documents, as they were read; its file
holds, as little-endian numbers (the first two lines uint64),

    header     num_segments, num_documents, num_tokens, bytes of a token
    bounds     documents and tokens before each segment, and in all
    documents  `DOCUMENT`, by segment, digest and position
    tokens     of the documents in that order

where segment b of the first half are the training documents of bucket b, of
the second half its held-out ones.
"""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple

from jaxtyping import Integer, Shaped
import numpy as np

from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import retry

DIGEST_BYTES = 16
# `position` is that in the source: the file in the upper 32 bits, the number in
# the file in the lower ones; `bytes` of text.
DOCUMENT = np.dtype(
  [
    ('high', '<u8'),
    ('low', '<u8'),
    ('position', '<u8'),
    ('tokens', '<u4'),
    ('bytes', '<u4'),
  ]
)
_HEADER = np.dtype(('<u8', 4))
# Tokens that are put in order at a time.
CHUNK = 2**22


class Segment(NamedTuple):
  """Documents and their tokens, in the same order."""

  documents: Shaped[np.ndarray, 'documents']  # of `DOCUMENT`
  tokens: Integer[np.ndarray, 't']


def described(
  texts: Sequence[bytes],
  lengths: Integer[np.ndarray, 'documents'],
  positions: Integer[np.ndarray, 'documents'],
) -> Shaped[np.ndarray, 'documents']:
  """The `DOCUMENT`s of texts of so many tokens."""
  documents = np.zeros(len(texts), DOCUMENT)
  digests = b''.join(
    hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest() for text in texts
  )
  high_low = np.frombuffer(digests, '<u8').reshape(-1, 2)
  documents['high'], documents['low'] = high_low.T
  documents['position'], documents['tokens'] = positions, lengths
  documents['bytes'] = [len(text) for text in texts]
  return documents


def write(
  path: paths.Path,
  segment: Segment,
  heldout: Shaped[np.ndarray, 'documents'],
  num_buckets: int,
):
  """Writes a part, at once; `heldout` tells which documents are."""
  documents, tokens = segment
  of = _buckets(documents, num_buckets) + num_buckets * heldout.astype(int)
  order = np.lexsort(
    (documents['position'], documents['low'], documents['high'], of)
  )
  counts = np.zeros((2 * num_buckets + 1, 2), '<u8')
  np.add.at(counts[:, 0], of + 1, 1)
  np.add.at(counts[:, 1], of + 1, documents['tokens'])
  header = np.array(
    [2 * num_buckets, len(documents), len(tokens), tokens.dtype.itemsize], '<u8'
  )
  with files_lib.replacing(path) as file:
    file.write(header.tobytes())
    file.write(counts.cumsum(axis=0, dtype='<u8').tobytes())
    file.write(documents[order].tobytes())
    for chunk in in_order(segment, order):
      file.write(chunk.tobytes())


def in_order(segment: Segment, order: Integer[np.ndarray, 'chosen']):
  """Yields the tokens of documents in an order, some millions at a time."""
  lengths = segment.documents['tokens'].astype(np.int64)
  starts = (lengths.cumsum() - lengths)[order]
  lengths = lengths[order]
  ends = lengths.cumsum()
  cuts = np.searchsorted(ends, np.arange(CHUNK, ends[-1:].sum(), CHUNK))
  for few in np.split(np.arange(len(order)), np.unique(cuts)):
    before = lengths[few].cumsum() - lengths[few]
    places = np.repeat(starts[few] - before, lengths[few])
    places += np.arange(len(places))
    yield segment.tokens[places]


class Part:
  """Reads segments of a part."""

  def __init__(self, path: paths.Path):
    """Raises ValueError if the file is not whole."""
    self._file = retry.File(path)
    head = self._file.pread(0, _HEADER.itemsize)
    if len(head) == _HEADER.itemsize:
      header = np.frombuffer(head, '<u8').tolist()
      self._segments, self._documents, tokens, width = header
      self.dtype = np.dtype(f'<u{width}') if width in (2, 4) else None
      self._size = self._token_start() + tokens * width
    found = files_lib.size(path)
    if len(head) < _HEADER.itemsize or not self.dtype or found != self._size:
      raise ValueError(
        f'{path} is damaged: delete its folder and prepare the data again'
      )

  def train(self, bucket: int) -> Segment:
    return self._segment(bucket, bucket + 1)

  def heldout(self) -> Segment:
    return self._segment(self._segments // 2, self._segments)

  def heldout_documents(
    self, bucket: int | None = None
  ) -> Shaped[np.ndarray, 'documents']:
    """Those of a bucket, or of all."""
    first, last = self._segments // 2, self._segments
    if bucket is not None:
      first, last = first + bucket, first + bucket + 1
    (first, _), (last, _) = self._bounds(first, last)
    return self._read(DOCUMENT, self._document_start(), first, last)

  def close(self):
    self._file.close()

  def _segment(self, first, last):
    (first, start), (last, end) = self._bounds(first, last)
    return Segment(
      self._read(DOCUMENT, self._document_start(), first, last),
      self._read(self.dtype, self._token_start(), start, end),
    )

  def _bounds(self, first, last):
    """Documents and tokens before two segments."""
    data = self._file.pread(
      _HEADER.itemsize + 16 * first, 16 * (last - first + 1)
    )
    return np.frombuffer(data, '<u8').reshape(-1, 2)[[0, -1]].tolist()

  def _document_start(self):
    return _HEADER.itemsize + 16 * (self._segments + 1)

  def _token_start(self):
    return self._document_start() + DOCUMENT.itemsize * self._documents

  def _read(self, dtype, start, first, last):
    start += dtype.itemsize * first
    data = self._file.pread(start, dtype.itemsize * (last - first))
    return np.frombuffer(data, dtype)


def distinct(
  documents: Shaped[np.ndarray, 'documents'],
  besides: Shaped[np.ndarray, 'others'],
) -> Integer[np.ndarray, 'chosen']:
  """Numbers of the documents in order of digest, without copies.

  Of copies the first one in the source stays, and none of one of `besides`.
  """
  high, low, position = (
    np.concatenate([documents[name], besides[name]])
    for name in ('high', 'low', 'position')
  )
  is_other = np.arange(len(high)) >= len(documents)
  order = np.lexsort((position, ~is_other, low, high))
  del position
  is_first = np.ones(len(order), bool)
  high, low = high[order], low[order]
  is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
  return order[is_first & ~is_other[order]]


def _buckets(documents, num_buckets):
  """floor(h / 2^32 * num_buckets) with h the upper 32 bits of the digest."""
  upper = (documents['high'] >> np.uint64(32)) * np.uint64(num_buckets)
  return (upper >> np.uint64(32)).astype(np.int64)
