"""Documents to a token folder, on any number of cores and machines.

Documents are read once, in parts of some megabytes, and tokenised into
OUT/parts; then the parts are merged into the shards of the folder (`merge`).
What comes out depends on the text and the vocabulary alone: not on cores,
machines or interruptions. Whatever is killed goes on from its last whole part.

The files are those of `unfinished`.
"""

from collections.abc import Iterator
import functools
import hashlib
import os
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, UInt
import numpy as np

from mhc.data import corruption
from mhc.data import documents as documents_lib
from mhc.data import merge
from mhc.data import parts
from mhc.data import sources
from mhc.data import tokenizer as tokenizer_lib
from mhc.data import unfinished
from mhc.runtime import console
from mhc.runtime import files as files_lib
from mhc.runtime import paths
from mhc.runtime import processes

# Documents tokenised together; a corpus of fewer is split as a whole.
BATCH = 512
VOCABULARY_BYTES = 100_000_000
# Text of a part, the least and the most, and its documents.
PART_BYTES = 2**20, 2**28
PART_DOCUMENTS = 2**16
BUCKET_BYTES = 2**28  # text of a shard, about
NUM_PARTS = 64  # of a corpus of medium size
MANY_BUCKETS = 64  # of a corpus of unknown size

Stage = Literal['all', 'vocabulary', 'tokens', 'merge']


class Plan(NamedTuple):
  """What all calls for one folder must agree on."""

  path: str
  text_field: str
  tokenizer: str  # 'train:N', or the SHA-256 of its description
  num_machines: int
  num_buckets: int
  part_bytes: int
  files: str  # SHA-256 of their names


class Piece(NamedTuple):
  """Documents of one part, and where they were."""

  number: int
  texts: list[bytes]
  names: list[str]
  heldout: Bool[np.ndarray, 'documents']
  positions: UInt[np.ndarray, 'documents']
  record: dict[str, Any]  # what is known before they are tokenised


def prepare(
  path: str,
  out: paths.Path,
  tokenizer: str,
  on_damage: str = 'stop',
  text_field: str = documents_lib.TEXT,
  *,
  start_mark: str | None = None,
  stop_mark: str | None = None,
  workers: int = 0,
  machine: int = 0,
  num_machines: int = 1,
  stage: Stage = 'all',
) -> dict[str, Any] | None:
  """Tokenises the text at `path` into the folder `out`.

  Args:
    path: file, folder or pattern of files that `documents` reads; a stream of
      Hugging Face (`sources.parse`); '' for the standard library.
    out: an empty or new folder, or one that earlier calls left incomplete.
    tokenizer: 'bytes', a tokenizer.json, or 'train:N' to learn a byte-level
      BPE vocabulary of N tokens from the first 100 MB.
    on_damage: as `DataConfig.on_damage`; the index counts what was skipped.
    text_field: of records, that which holds the text.
    start_mark: names another mark than the vocabulary's own before a document,
      '' none.
    stop_mark: likewise, after a document.
    workers: processes, 0 for as many as there are cores.
    machine: which of `num_machines` this is, from 0.
    stage: only the vocabulary, only the tokens of this machine, or only the
      merge, of which each machine does its share.

  Exact copies are dropped; the split is that of `documents`.

  Returns:
    The folder's index; None if other stages or machines have to follow.

  Raises:
    OSError, ValueError: unusable files, tokenizer or folder.
  """
  if num_machines > 1 and stage == 'all':
    raise ValueError(
      f'--shard={machine}/{num_machines} needs a --stage: tokens on each '
      'machine, then merge on each'
    )
  source = sources.open_source(path, text_field, machine, num_machines)
  if source.summary:
    console.print_line(f'{path}: {source.summary}')
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # processes instead
  workers = workers or processes.num_cores()
  vocabulary = _given(tokenizer, start_mark, stop_mark)
  plan = _plan(source, path, text_field, vocabulary or tokenizer, num_machines)
  folder = unfinished.Folder(out, plan._asdict())
  fingerprint = sources.fingerprint(source)
  index = folder.finished(fingerprint)
  if index:
    return index
  if vocabulary is None:
    vocabulary = _learned(folder, source, plan, on_damage, stage)
  if stage == 'vocabulary':
    return None
  plan = Plan(**folder.agree())
  if stage != 'merge':
    log = corruption.SkipLog(on_damage)
    _tokenise(source, folder, plan, vocabulary, workers, machine, log)
  if stage == 'tokens':
    return None
  return merge.merge(
    folder,
    path or source.names[0],
    vocabulary,
    fingerprint,
    source.names,
    workers,
    machine,
  )


def _given(tokenizer, start, stop) -> tokenizer_lib.Tokenizer | None:
  """The vocabulary that is asked for, None for one to be learned."""
  kind, _, number = tokenizer.partition(':')
  if kind != 'train':
    return tokenizer_lib.load(tokenizer, start, stop)
  if not number.isdigit() or int(number) < 258:
    raise ValueError(
      f'tokenizer={tokenizer!r}: train:N needs the number of tokens, 258 or '
      'more, such as train:32768'
    )
  if (start, stop) != (None, None):
    raise ValueError(
      f'tokenizer={tokenizer!r} has marks of its own: leave out --start_mark '
      'and --stop_mark'
    )
  tokenizer_lib.library()  # before any work
  return None


def _plan(source, path, text_field, vocabulary, num_machines):
  size = source.num_text_bytes
  least, most = PART_BYTES
  if not isinstance(vocabulary, str):
    vocabulary = _sha256(vocabulary.description)
  return Plan(
    path=path,
    text_field=text_field,
    tokenizer=vocabulary,
    num_machines=num_machines,
    num_buckets=-(-size // BUCKET_BYTES) or MANY_BUCKETS,
    part_bytes=min(max(size // NUM_PARTS, least), most) if size else most,
    files=_sha256('\n'.join(source.names)),
  )


def _sha256(text):
  return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()


def _learned(folder, source, plan, on_damage, stage) -> tokenizer_lib.Tokenizer:
  """A vocabulary of the text, learned once."""
  if folder.vocabulary.exists():
    return tokenizer_lib.load(folder.vocabulary)
  if plan.num_machines > 1 and stage != 'vocabulary':
    raise ValueError(
      f'{folder.path} has no vocabulary yet that the machines of --shard could '
      'share: first run one of them with --stage=vocabulary'
    )
  if plan.num_machines > 1:  # of all files
    source = sources.open_source(plan.path, plan.text_field)
  os.environ['TOKENIZERS_PARALLELISM'] = 'true'
  total = min(source.total, VOCABULARY_BYTES)
  with console.byte_bar(total, 'learn words') as bar:
    read = source.read(sources.Place(), corruption.SkipLog(on_damage))
    vocabulary = tokenizer_lib.BPE.train(
      _sample(read, bar.update), int(plan.tokenizer.partition(':')[2])
    )
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  files_lib.replace(folder.vocabulary, vocabulary.description)
  return vocabulary


def _sample(read, progress):
  """Texts of the training side, about `VOCABULARY_BYTES` of them."""
  size = 0
  for document, taken, _, _ in read:
    progress(taken)
    if documents_lib.is_held_out(document):
      continue
    yield document.text
    size += len(document.text)
    if size >= VOCABULARY_BYTES:
      return


def _tokenise(source, folder, plan, vocabulary, workers, machine, log):
  """Makes the parts of this machine that are not there yet."""
  done = folder.records(machine, source.stamp)
  if done and done[-1]['is_last']:
    return
  folder.begin_parts()
  place = sources.Place(*done[-1]['next']) if done else sources.Place()
  pieces = _pieces(source, place, len(done), log, plan)
  if source.total and source.total <= plan.part_bytes:
    workers = 1
  tokenise = functools.partial(
    _tokenise_piece,
    folder=folder,
    machine=machine,
    plan=plan,
    description=vocabulary.description,
  )
  with console.byte_bar(source.total, 'tokenise') as bar:
    bar.update(sum(record['size'] for record in done))
    for record, problems in processes.ordered_map(tokenise, pieces, workers):
      for problem in problems:
        log.report(problem)
      folder.add_record(machine, record)
      done.append(record)
      bar.update(record['size'])
  if log.count:
    console.print_line(log.summary())
  empty = not any(record['documents'] for record in done)
  if empty and plan.num_machines == 1:
    why = log.summary() or 'every file is empty'
    folder.discard()
    raise ValueError(f'{plan.path!r} holds no text: {why}')
  changed = sum(record['normalized'] for record in done)
  if changed:
    console.print_line(
      f'{changed:,} documents were changed by the normalizer of the '
      'vocabulary: losses are those of what it made of them'
    )


def _pieces(source, place, number, log, plan) -> Iterator[Piece]:
  """Cuts the documents from `place` on into parts, the last one said so."""
  read, is_last = source.read(place, log), False
  while not is_last:
    found, size, before = [], 0, log.count
    while size < plan.part_bytes and len(found) < PART_DOCUMENTS:
      one = next(read, None)
      if one is None:
        is_last = True
        break
      found.append(one)
      size += len(one.document.text)
    if found:
      place = source.after(found[-1])
    record = {
      'size': sum(one.size for one in found),
      'skipped': log.count - before,
      'next': place,
      'stamps': {
        str(file): source.stamp(file) for file in {one.file for one in found}
      },
      'is_last': is_last,
    }
    documents = [one.document for one in found]
    positions = [one.file << 32 | one.number for one in found]
    if is_last and number == 0 and plan.num_machines == 1:
      documents, positions = _split_few(documents, positions, log)
    yield Piece(
      number,
      [document.text for document in documents],
      [document.name for document in documents],
      np.array(
        [documents_lib.is_held_out(document) for document in documents], bool
      ),
      np.array(positions, np.uint64),
      record,
    )
    number += 1


def _split_few(documents, positions, log):
  """Gives both sides some of a few documents; more are split by their names."""
  where = {
    document.name: position
    for document, position in zip(documents, positions, strict=True)
  }
  few = documents_lib.distinct(documents)
  if not few or len(few) >= BATCH:
    return documents, positions
  sides = documents_lib.split(few, log.names)
  documents = [
    document._replace(side=side)
    for side, some in zip(('train', 'heldout'), sides, strict=True)
    for document in some
  ]
  return documents, [where[document.name] for document in documents]


def _tokenise_piece(
  piece: Piece, *, folder, machine, plan, description
) -> tuple[dict[str, Any], list[str]]:
  """Writes a part; returns its record, and what of it cannot be tokenised."""
  vocabulary = _loaded(description)
  changed = vocabulary.num_normalized
  tokens, lengths, problems = [], [], []
  for start in range(0, len(piece.texts), BATCH):
    encoded = vocabulary.encode_each(piece.texts[start : start + BATCH])
    tokens.append(encoded.tokens)
    lengths.append(encoded.lengths)
  lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
  texts = piece.texts
  for number in np.flatnonzero(lengths == 0).tolist():
    problems.append(f'{piece.names[number]}: {vocabulary.lossy(texts[number])}')
  tokens = np.concatenate(tokens) if tokens else np.zeros(0, vocabulary.dtype)
  described = parts.described(texts, lengths, piece.positions)
  good = (lengths > 0) & np.array([bool(text.strip()) for text in texts], bool)
  kept = np.concatenate(
    list(parts.in_order(parts.Segment(described, tokens), np.flatnonzero(good)))
  )
  parts.write(
    folder.part(machine, piece.number),
    parts.Segment(described[good], kept),
    piece.heldout[good],
    plan.num_buckets,
  )
  record = piece.record | {
    'number': piece.number,
    'documents': int(good.sum()),
    'skipped': piece.record['skipped'] + len(problems),
    'normalized': vocabulary.num_normalized - changed,
    'files': _fingerprints(described),
  }
  return record, problems


def _fingerprints(documents) -> dict[str, list]:
  """Documents of each file, and the sum of their digests modulo 2^64."""
  found = {}
  of = documents['position'] >> np.uint64(32)
  for file in np.unique(of).tolist():
    mine = documents[of == file]
    digest = np.add.reduce(mine['high'] ^ mine['low'], dtype=np.uint64)
    found[str(file)] = [len(mine), int(digest)]
  return found


@functools.lru_cache(1)
def _loaded(description):
  if description == 'bytes':
    return tokenizer_lib.Bytes()
  return tokenizer_lib.BPE(description)
