"""Samples from a checkpoint: `python launch/sample.py --workdir=runs/tiny`.

python launch/sample.py --workdir=runs/mine --prompt='def main(' \
  --temperature=0.8 --top_p=0.95 --num_tokens=400
"""

import codecs
import sys

from absl import flags
import numpy as np

from mhc.runtime import cli
from mhc.runtime import paths
from mhc.training import generate as generate_lib
from mhc.training import workdir as workdir_lib

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run.', required=True
)
PROMPT = flags.DEFINE_string('prompt', '', 'Text to continue.')
NUM_TOKENS = flags.DEFINE_integer(
  'num_tokens', 200, 'Largest number of tokens to add.', lower_bound=1
)
NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 1, 'Number of continuations.', lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'Temperature; 0 takes the most likely token.'
)
TOP_P = flags.DEFINE_float('top_p', 0.95, 'Probability mass of the nucleus.')
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the sampler.')
TOKENIZER = cli.define_tokenizer()


def main():
  workdir = paths.path(WORKDIR.value)
  model, bias, tokenizer = generate_lib.restore(workdir, TOKENIZER.value)
  prompt = np.concatenate(
    [[tokenizer.start], tokenizer.encode(PROMPT.value.encode())]
  )
  drawn = generate_lib.generate(
    model,
    bias,
    prompt,
    num_samples=NUM_SAMPLES.value,
    num_tokens=NUM_TOKENS.value,
    seed=SEED.value,
    temperature=TEMPERATURE.value,
    top_p=TOP_P.value,
  )
  if NUM_SAMPLES.value == 1:
    # Printed as it is drawn; a character may take several tokens.
    text = codecs.getincrementaldecoder('utf-8')('replace')
    print(PROMPT.value, end='', flush=True)
    for tokens in drawn:
      if tokens[0] == tokenizer.stop:
        break
      print(text.decode(tokenizer.decode(tokens)), end='', flush=True)
    print()
  else:
    _print_all(tokenizer, drawn)
  length = len(prompt) + NUM_TOKENS.value
  trained = workdir_lib.read_config(workdir).data.seq_len
  if length > trained:
    print(
      f'note: the model was trained on sequences of {trained} tokens; '
      f'positions from there up to {length} are extrapolated',
      file=sys.stderr,
    )


def _print_all(tokenizer, drawn):
  for number, tokens in enumerate(np.stack(list(drawn), axis=1)):
    ends = np.flatnonzero(tokens == tokenizer.stop)
    tokens = tokens[: ends[0]] if len(ends) else tokens
    text = tokenizer.decode(tokens).decode(errors='replace')
    print(f'--- {number}\n{PROMPT.value}{text}')


if __name__ == '__main__':
  cli.run(main)
