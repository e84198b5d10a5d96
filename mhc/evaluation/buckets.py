"""Rows of any length as batches of few shapes, each compiled once."""

from collections.abc import Iterator, Sequence

from jaxtyping import Int
import numpy as np

SHORTEST = 16


def length(tokens: int, most: int) -> int:
  """The least of 16, 24, 32, 48, 64, ... that holds so many tokens.

  Where that is above `most`, it is `most`.
  """
  size = SHORTEST
  while size < tokens:
    size += size // 2 if size & (size - 1) == 0 else size // 3
  return min(size, most)


def batches(
  lengths: Sequence[int], most: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
  """Numbers of rows that share a bucket, at most `batch_size`; longest first.

  Yields:
    the length of the bucket, and the numbers in order of their lengths.
  """
  order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
  start = 0
  while start < len(order):
    size = length(lengths[order[start]], most)
    chosen = [
      row
      for row in order[start : start + batch_size]
      if length(lengths[row], most) == size
    ]
    yield size, chosen
    start += len(chosen)


def padded(
  rows: Sequence[Sequence[int]], batch_size: int, size: int
) -> Int[np.ndarray, 'b t']:
  """The rows at the left of int32 [batch_size, size], zeros elsewhere."""
  out = np.zeros((batch_size, size), np.int32)
  for number, row in enumerate(rows):
    out[number, : len(row)] = row
  return out
