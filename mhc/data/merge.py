"""The parts of a corpus to the shards of its token folder.

Each bucket is one shard of training tokens, in order of digest: shuffled once
for all. Held-out documents stay in the order of the source, so that they are
the same rows as those of the text itself.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import hashlib
import json
from typing import Any

import numpy as np

from mhc.data import parts as parts_lib
from mhc.data import token_dataset
from mhc.data import tokenizer as tokenizer_lib
from mhc.data import unfinished
from mhc.runtime import console
from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import processes

HELDOUT = -1  # the job of the held-out documents, beside one a bucket
OPEN_PARTS = 16


def merge(
  folder: unfinished.Folder,
  name: str,
  vocabulary: tokenizer_lib.Tokenizer,
  fingerprint: str,
  names: list[str],
  workers: int,
  machine: int = 0,
) -> dict[str, Any] | None:
  """Makes this machine's share of the shards; the last one writes the index.

  Args:
    folder: with the parts of all machines.
    name: of the corpus.
    vocabulary: its vocabulary.
    fingerprint: of its files.
    names: of its files.
    workers: processes.
    machine: which one this is.

  Returns:
    The index; None if other machines have to make shards yet.
  """
  records = folder.all_records()
  paths = [
    folder.part(number, record['number'])
    for number, of_machine in enumerate(records)
    for record in of_machine
  ]
  plan = folder.plan
  num_machines, num_buckets = plan['num_machines'], plan['num_buckets']
  jobs = [*range(num_buckets), HELDOUT]
  mine = [
    job
    for job in jobs[machine::num_machines]
    if not folder.shard_record(_name(job)).exists()
  ]
  workers = min(workers, num_buckets)  # one is small: not worth a process
  make = functools.partial(_make, folder=folder, paths=paths)
  with console.progress_bar(len(mine), 0, 'merge') as bar:
    for _ in processes.ordered_map(make, mine, workers):
      bar.update()
  made = [folder.shard_record(_name(job)) for job in jobs]
  missing = sum(not record.exists() for record in made)
  if missing:
    console.print_line(f'{missing} shards of {len(jobs)} are left to others')
    return None
  try:
    shards = [files_lib.read_json(record) for record in made]
  except FileNotFoundError:  # another machine was faster
    return folder.finished(fingerprint)
  flat = [record for of_machine in records for record in of_machine]
  _write_sources(folder.path / 'sources.json', names, flat)
  index = token_dataset.index_of(
    folder.path,
    name,
    vocabulary,
    shards,
    num_skipped=sum(record['skipped'] for record in flat),
  )
  return folder.close(index, fingerprint)


def _name(job):
  return 'heldout' if job == HELDOUT else f'train-{job:05d}'


def _make(job: int, folder: unfinished.Folder, paths: list[paths.Path]):
  """Makes a shard, or all that are held out, and then its record."""
  if job == HELDOUT:
    documents, tokens = _heldout(paths)
  else:
    documents, tokens = _bucket(job, paths)
  side = 'heldout' if job == HELDOUT else 'train'
  files = token_dataset.write_shards(
    folder.path, side, max(job, 0), tokens, split=job == HELDOUT
  )
  digests = np.stack([documents['high'], documents['low']], axis=1)
  record = {
    'side': side,
    'files': files,
    'documents': len(documents),
    'bytes': int(documents['bytes'].sum()),
    'sha256': hashlib.sha256(digests.tobytes()).hexdigest(),
  }
  files_lib.replace(folder.shard_record(_name(job)), json.dumps(record))


def _bucket(job, paths):
  """Training documents of a bucket in order of digest, and their tokens."""
  documents, tokens, heldout = [], [], []
  for path in paths:
    with contextlib.closing(parts_lib.Part(path)) as part:
      segment = part.train(job)
      documents.append(segment.documents)
      tokens.append(segment.tokens)
      heldout.append(part.heldout_documents(job))
  documents = np.concatenate(documents)  # one after the other, for memory
  segment = parts_lib.Segment(documents, np.concatenate(tokens))
  del documents, tokens
  order = parts_lib.distinct(segment.documents, np.concatenate(heldout))
  return segment.documents[order], parts_lib.in_order(segment, order)


def _heldout(paths):
  """Held-out documents in order of the source, and their tokens."""
  found, of = [], []
  for number, path in enumerate(paths):
    with contextlib.closing(parts_lib.Part(path)) as part:
      found.append(part.heldout_documents())
    of.append(np.full(len(found[-1]), number))
  documents, of = np.concatenate(found), np.concatenate(of)
  kept = parts_lib.distinct(documents, documents[:0])
  kept = kept[np.argsort(documents['position'][kept], kind='stable')]
  documents, of = documents[kept], of[kept]
  return documents, _heldout_tokens(documents, of, paths)


def _heldout_tokens(documents, of, paths) -> Iterator[np.ndarray]:
  """Yields runs of documents of the same part."""

  @functools.lru_cache(OPEN_PARTS)
  def read(number):
    with contextlib.closing(parts_lib.Part(paths[number])) as part:
      return part.heldout()

  cuts = np.flatnonzero(of[1:] != of[:-1]) + 1
  for run in np.split(np.arange(len(of)), cuts):
    if not len(run):
      continue
    segment = read(int(of[run[0]]))
    by_position = np.argsort(segment.documents['position'], kind='stable')
    positions = segment.documents['position'][by_position]
    places = np.searchsorted(positions, documents['position'][run])
    yield from parts_lib.in_order(segment, by_position[places])


def _write_sources(path, names, records: Iterable[dict[str, Any]]):
  """Documents and fingerprints of each file, as they were read."""
  files = {}
  for record in records:
    for file, (count, digest) in record['files'].items():
      size, _ = record['stamps'][file]
      entry = files.setdefault(
        names[int(file)], {'bytes': size, 'documents': 0, 'fingerprint': 0}
      )
      entry['documents'] += count
      entry['fingerprint'] = (entry['fingerprint'] + digest) % 2**64
  text = json.dumps(files, indent=1, sort_keys=True) + '\n'
  files_lib.replace(path, text, shared=True)
