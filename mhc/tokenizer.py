"""Bytes as tokens: lossless, no vocabulary file.

Token i < 256 is byte i; BOS opens a document and EOS closes it.
"""

from collections.abc import Sequence

import numpy as np

BOS = 256
EOS = 257
NUM_TOKENS = 258


def encode(documents: Sequence[bytes]) -> np.ndarray:
  """One flat uint16 array: BOS, bytes, EOS of every document in order."""
  size = sum(len(text) + 2 for text in documents)
  tokens = np.empty(size, np.uint16)
  start = 0
  for text in documents:
    stop = start + len(text) + 2
    tokens[start] = BOS
    tokens[start + 1 : stop - 1] = np.frombuffer(text, np.uint8)
    tokens[stop - 1] = EOS
    start = stop
  return tokens


def decode(tokens: np.ndarray) -> str:
  """The text of the byte tokens; invalid UTF-8 becomes U+FFFD."""
  tokens = np.asarray(tokens)
  return (
    tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors='replace')
  )
