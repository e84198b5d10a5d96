"""Tokenises a corpus of any size, once for all runs.

    python launch/prepare_data.py --path='texts/*.jsonl' --out=data/mine \
      --tokenizer=train:32768
    python launch/train.py --workdir=runs/mine --config.data.path=data/mine \
      --config.model.vocab_size=32768

Reads UTF-8 text, JSON lines and Parquet (the field `text`, or --text_field) and
ArrayRecord, text and JSON also compressed; docs/your_own_text.md.
"""

import pathlib

from absl import flags

from mhc.data import tokenize_corpus
from mhc.runtime import cli

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


def main():
  index = tokenize_corpus.prepare(
    PATH.value,
    pathlib.Path(OUT.value),
    TOKENIZER.value,
    ON_DAMAGE.value,
    TEXT_FIELD.value,
  )
  train, heldout = sum(index['train']), sum(index['heldout'])
  print(
    f'{index["num_documents"]:,} documents, {index["num_bytes"]:,} bytes: '
    f'{train:,} tokens for training, {heldout:,} held out, '
    f'{index["num_bytes"] / (train + heldout):.2f} bytes a token, vocabulary '
    f'of {index["num_tokens"]:,}; in {OUT.value}'
    + f'; {index["num_skipped"]:,} DAMAGED left out'
    * bool(index['num_skipped'])
  )


if __name__ == '__main__':
  cli.run(main, computes=False)
