"""Tokenises a corpus of any size, once for all runs.

    python launch/prepare_data.py --path='texts/*.jsonl' --out=data/mine \
      --tokenizer=train:32768
    python launch/train.py --workdir=runs/mine --config.data.path=data/mine \
      --config.model.vocab_size=32768

Reads UTF-8 text, JSON lines and Parquet (the field `text`, or --text_field) and
ArrayRecord, text and JSON also compressed, and streams hf://NAME:SPLIT from
Hugging Face; docs/your_own_text.md. On all cores; killed at any point, the same
command goes on. On many machines that share a file system:

    python launch/prepare_data.py ... --stage=vocabulary  # for train:N, on one
    python launch/prepare_data.py ... --stage=tokens --shard=I/N  # on each of N
    python launch/prepare_data.py ... --stage=merge --shard=I/N   # then these
"""

import re

from absl import flags

from mhc.data import tokenize_corpus
from mhc.runtime import cli
from mhc.runtime import paths

PATH = flags.DEFINE_string(
  'path', '', "File, folder or pattern; '' for Python's standard library."
)
OUT = flags.DEFINE_string('out', None, 'Folder to write.', required=True)
TOKENIZER = flags.DEFINE_string(
  'tokenizer', 'bytes', "'bytes', a tokenizer.json, or train:N to learn N."
)
ON_DAMAGE = flags.DEFINE_enum(
  'on_damage',
  'stop',
  ['stop', 'skip'],
  'What to do with a corrupted record: stop, or skip it and count it.',
)
TEXT_FIELD = flags.DEFINE_string(
  'text_field', 'text', 'Field of JSON or column of Parquet with the text.'
)

START_MARK = flags.DEFINE_string(
  'start_mark',
  None,
  "Token of the vocabulary before a document, '' for none; by default its own.",
)
STOP_MARK = flags.DEFINE_string(
  'stop_mark', None, 'Token after a document; by default its own.'
)
WORKERS = flags.DEFINE_integer(
  'workers', 0, 'Processes; 0 for one a core.', lower_bound=0
)
SHARD = flags.DEFINE_string(
  'shard', '0/1', 'I/N: this is machine I of N, from 0.'
)
STAGE = flags.DEFINE_enum(
  'stage',
  'all',
  ['all', 'vocabulary', 'tokens', 'merge'],
  'What to do: all of it, or a part, as machines do that share the work.',
)


def main():
  machine, num_machines = _shard(SHARD.value)
  index = tokenize_corpus.prepare(
    PATH.value,
    paths.path(OUT.value),
    TOKENIZER.value,
    ON_DAMAGE.value,
    TEXT_FIELD.value,
    start_mark=START_MARK.value,
    stop_mark=STOP_MARK.value,
    workers=WORKERS.value,
    machine=machine,
    num_machines=num_machines,
    stage=STAGE.value,
  )
  if index is None:
    print(f'{OUT.value}: {STAGE.value} of --shard={SHARD.value} done')
    return
  train, heldout = sum(index['train']), sum(index['heldout'])
  print(
    f'{index["num_documents"]:,} documents, {index["num_bytes"]:,} bytes: '
    f'{train:,} tokens for training, {heldout:,} held out, '
    f'{index["num_bytes"] / (train + heldout):.2f} bytes a token, vocabulary '
    f'of {index["num_tokens"]:,}; in {OUT.value}'
    + f'; {index["num_skipped"]:,} DAMAGED left out'
    * bool(index['num_skipped'])
  )


def _shard(text: str) -> tuple[int, int]:
  found = re.fullmatch(r'(\d+)/(\d+)', text)
  machine, num_machines = map(int, found.groups()) if found else (0, 0)
  if machine >= num_machines:
    raise ValueError(
      f'--shard={text} is not I/N with I from 0 to N - 1, such as 0/8'
    )
  return machine, num_machines


if __name__ == '__main__':
  cli.run(main, computes=False)
