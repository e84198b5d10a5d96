"""A run's model for other code: a folder of safetensors.

'mhc'           under our own names, with the run's config.json
'huggingface'   for transformers: as a class that it has, or with the file
                that defines one
"""

import dataclasses
from typing import Literal

import jax

from mhc.interop import huggingface
from mhc.interop import names
from mhc.interop import safetensors
from mhc.model import layers
from mhc.runtime import config_file
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import vocabulary
from mhc.training import workdir as workdir_lib


def export(
  workdir: paths.Path,
  out: paths.Path,
  max_bytes: int = safetensors.MAX_BYTES,
  given: str | None = None,
  names_of: Literal['mhc', 'huggingface'] = 'mhc',
) -> int:
  """Writes a run's newest checkpoint, without the optimiser.

  Besides the state this takes the memory of one file. The folder `out`, which
  must not exist or be empty, appears once it is complete.

  Args:
    workdir: the run's folder.
    out: as for `interop.load` or `huggingface.load`.
    max_bytes: largest file; larger models are sharded. A tensor is never split.
    given: the vocabulary of a run whose own is unknown, a tokenizer.json or
      'bytes'.
    names_of: whose tensors, see above. Adapters are added to their matrices for
      Hugging Face.

  Returns:
    the number of updates of the checkpoint.

  Raises:
    ValueError: no run, no checkpoint, no known vocabulary, a model that its
      tensors do not define, or `out` is not empty.
  """
  config, out = workdir_lib.read_config(workdir), paths.absolute(out)
  tokenizer = vocabulary.required(workdir, given)
  model = config.model
  if names_of == 'huggingface':
    model = dataclasses.replace(model, adapter_rank=0)
    ends = tokenizer.start, tokenizer.stop
    values = huggingface.to_config(model, config.data.seq_len, ends)
  else:
    names.check_model(model)
  safetensors.check_empty(out)
  state = checkpoint.restore_model(workdir, jax.local_devices(backend='cpu')[0])
  step, bias = int(state.step), {'router_bias': state.router_bias}
  with safetensors.made(out) as partial:
    vocabulary.write(partial, tokenizer)
    if names_of == 'huggingface':
      tree = layers.merged(state.params) | bias
      huggingface.write(partial, model, tree, values, max_bytes, step)
    else:
      config_file.write(partial, config)
      parts = names.tensors(model)
      safetensors.write(partial, state.params | bias, parts, max_bytes, step)
  return step
