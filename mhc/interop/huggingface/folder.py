"""Folders of Hugging Face: config.json, safetensors, tokenizer.json."""

import json
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np

from mhc import config as config_lib
from mhc.interop import names
from mhc.interop import safetensors
from mhc.interop.huggingface import settings
from mhc.interop.huggingface import tensors
from mhc.parallel.placement import Params
from mhc.runtime import files
from mhc.runtime import paths

# Tensors that a class can make itself, or that it does not use.
IGNORED = 'rotary_emb.inv_freq'


def is_folder(folder: paths.Path) -> bool:
  """Whether the config.json of a folder is one of Hugging Face's."""
  file = folder / safetensors.CONFIG
  if not file.exists():
    return False
  values = files.read_json(file)
  return 'model_type' in values or 'architectures' in values


def read_settings(folder: paths.Path) -> config_lib.ModelConfig:
  """Our settings of the model in a folder.

  Raises:
    ValueError: the class is not one of `settings`, or the model has a part that
      ours lacks.
  """
  file = folder / safetensors.CONFIG
  try:
    return settings.of_config(files.read_json(file))
  except KeyError as error:
    raise ValueError(f'{file} has no {error}, which a model needs') from None
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from None


def load(
  folder: paths.Path,
) -> tuple[config_lib.ModelConfig, Params, Float[np.ndarray, 'l e'] | None]:
  """Reads a model: its settings, parameters, float32, and the router's bias.

  Weights of float16 and bfloat16 become float32, exactly.

  Raises:
    ValueError: the class is not one of `settings`, the model has a part that
      ours lacks, or a tensor is missing, unknown or of another shape.
  """
  model = read_settings(folder)
  values = files.read_json(folder / safetensors.CONFIG)
  interleaved = values.get('rope_interleave', True)
  parts = tensors.tensors(model, interleaved=interleaved)
  describe = f': {folder} is a {settings.architecture(values)}'
  with safetensors.opened(folder) as where:
    where = _known(where, model)
    slices = {name: file.get_slice(name) for name, file in where.items()}
    names.check(slices, parts, describe, halves=True)
    tree = safetensors.read(where, parts, model)
  return model, tree, tree.pop('router_bias', None)


def _known(where, model):
  """Without tensors of what is not the model itself."""
  layers = [f'model.layers.{model.num_blocks + i}.' for i in range(4)]
  kept = {
    name: file
    for name, file in where.items()
    if IGNORED not in name and not name.startswith(tuple(layers))
  }
  if model.tied_embeddings and 'lm_head.weight' in kept:
    head, table = (
      kept[name].get_tensor(name)
      for name in ('lm_head.weight', 'model.embed_tokens.weight')
    )
    if head.shape != table.shape or (head != table).any():
      raise ValueError(
        'lm_head.weight is not model.embed_tokens.weight, but config.json has '
        'tie_word_embeddings=true: set it to false, or leave the tensor out'
      )
    del kept['lm_head.weight']
  return kept


def write(
  folder: pathlib.Path,
  model: config_lib.ModelConfig,
  tree: Params,
  values: dict[str, Any],
  max_bytes: int = safetensors.MAX_BYTES,
  step: int = 0,
):
  """Writes config.json `values` and the tensors of a tree to a folder."""
  text = json.dumps(values, indent=2) + '\n'
  files.replace(folder / safetensors.CONFIG, text)
  if model.connection.kind != 'residual':
    names.check_model(model)
    source = pathlib.Path(__file__).with_name(settings.CODE)
    (folder / settings.CODE).write_bytes(source.read_bytes())
  parts = tensors.tensors(model)
  safetensors.write(folder, tree, parts, max_bytes, step)
