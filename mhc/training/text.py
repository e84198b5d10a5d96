"""The text of a run, recorded when it begins: a run that goes on must find it.

text.json    name, digest and number of tokens
"""

import json

from mhc.data import mixture as mixture_lib
from mhc.runtime import files
from mhc.runtime import paths

TEXT = 'text.json'


def keep(workdir: paths.Path, mixture: mixture_lib.Mixture):
  """Records the text of a run that starts, or checks that of one that goes on.

  Raises:
    ValueError: the run has begun with another text.
  """
  file = workdir / TEXT
  now = {
    'name': ', '.join(mixture.names),
    'sha256': mixture.sha256,
    'train_tokens': mixture.num_train_tokens,
    'heldout_tokens': mixture.num_heldout_tokens,
  }
  if not file.exists():
    files.replace(file, json.dumps(now, indent=2) + '\n')
    return
  hint = f'delete {file} to go on with the text as it is'
  try:
    begun = files.read_json(file)
    same = begun['sha256'] == now['sha256']
    then = f'{begun["train_tokens"]:,} tokens to train on'
  except KeyError as error:
    raise ValueError(f'{file} is damaged: it has no {error}; {hint}') from None
  except (ValueError, TypeError) as error:
    raise ValueError(f'{error}; {hint}') from None
  if not same:
    raise ValueError(
      f'the text of {workdir} has changed since it began ({then} then, '
      f'{now["train_tokens"]:,} now): give it the same, choose another '
      f'--workdir, or {hint}'
    )
