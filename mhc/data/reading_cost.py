"""How fast rows of a token folder are read, beside the disk itself.

A training loop is imitated: a step that takes its time and then asks for its
batch, of which the share of the step that it waits is measured. A read may be
given a latency, as that of a network's file system or of an object store.
"""

from collections.abc import Iterator
import contextlib
import os
import resource
import time
from typing import Any

import numpy as np

from mhc import config as config_lib
from mhc.data import batches
from mhc.data import corpus as corpus_lib
from mhc.data import mixture as mixture_lib
from mhc.data import token_dataset
from mhc.data import tokenizer as tokenizer_lib
from mhc.runtime import paths
from mhc.runtime import retry

SHARD_TOKENS = 2**24
SEQ_LEN = 4096
CHUNK = 2**20  # bytes of a read of the whole file


def make_folder(path: paths.Path, num_tokens: int):
  """Writes a token folder of random bytes."""
  rng, written = np.random.default_rng(0), []
  sizes = {'train': num_tokens, 'heldout': 2 * SEQ_LEN}
  for side, size in sizes.items():
    for number, start in enumerate(range(0, size, SHARD_TOKENS)):
      count = min(SHARD_TOKENS, size - start)
      tokens = rng.integers(0, 256, count, dtype=np.uint16)
      files = token_dataset.write_shards(path, side, number, [tokens])
      written.append(
        {'side': side, 'files': files, 'documents': 1, 'bytes': count}
        | {'sha256': ''}
      )
  token_dataset.write_index(
    path,
    token_dataset.index_of(path, 'random', tokenizer_lib.Bytes(), written),
  )


def rows(
  path: paths.Path,
  batch_size: int = 64,
  step_s: float = 0.5,
  latency_s: float = 0.02,
  num_steps: int = 40,
) -> Iterator[dict[str, Any]]:
  """Yields, for each way of reading, a row of what was measured.

  `rows_s` and `share_of_disk` are of reading as fast as it goes, without
  latency; `wait` is the share of a step of `step_s` that it waits for its batch
  with `latency_s` for each read; `peak_mb` what the process grew by.
  """
  disk = _disk_bytes_s(path)
  for block_rows, read_ahead in ((1, 0), (1, 4), (64, 0), (64, 4)):
    settings = config_lib.DataConfig(
      seq_len=SEQ_LEN,
      batch_size=batch_size,
      block_rows=block_rows,
      read_ahead=read_ahead,
    )
    before = _peak_bytes()
    start, iterator = time.perf_counter(), _batches(path, settings)
    for _ in range(num_steps):
      next(iterator)
    rows_s = num_steps * batch_size / (time.perf_counter() - start)
    with _latency(latency_s) as reads:
      iterator = _batches(path, settings)
      next(iterator)
      reads.clear()
      waited = 0.0
      for _ in range(num_steps):
        time.sleep(step_s)
        start = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - start
    yield {
      'block_rows': block_rows,
      'read_ahead': read_ahead,
      'rows_s': rows_s,
      'share_of_disk': rows_s * SEQ_LEN * 2 / disk,
      'reads_a_step': len(reads) / num_steps,
      'mb_a_step': sum(reads) / num_steps / 1e6,
      'wait': waited / num_steps / step_s,
      'peak_mb': (_peak_bytes() - before) / 1e6,
    }


def _batches(path, settings):
  mixture = mixture_lib.Mixture.of(corpus_lib.load(str(path)))
  return batches.train_batches(mixture, settings, 0, 320)


def _disk_bytes_s(path):
  """Reads all token files from start to end, uncached where that is allowed."""
  total, start = 0, time.perf_counter()
  for file in sorted(path.glob('train-*.bin')):
    descriptor = os.open(file, os.O_RDONLY)
    while data := os.read(descriptor, CHUNK):
      total += len(data)
    os.close(descriptor)
  return total / (time.perf_counter() - start)


@contextlib.contextmanager
def _latency(seconds):
  """Makes every read take longer; yields the list of their sizes."""
  read, sizes = retry.File.pread, []

  def slow(file, first, size):
    sizes.append(size)
    time.sleep(seconds)
    return read(file, first, size)

  retry.File.pread = slow
  try:
    yield sizes
  finally:
    retry.File.pread = read


def _peak_bytes():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
