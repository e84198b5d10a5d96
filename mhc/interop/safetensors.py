"""Models as safetensors, one tensor per block and expert: read and written.

The names are those of docs/interop.md, or of what others read.
"""

from collections.abc import Iterator
import contextlib
import json
import math
import pathlib
import re
import shutil
import tempfile
import uuid

import jax
from jaxtyping import Float
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from mhc import config as config_lib
from mhc.interop import names
from mhc.parallel.placement import Params
from mhc.runtime import config_file
from mhc.runtime import files
from mhc.runtime import paths
from mhc.runtime import retry

MAX_BYTES = 5 * 10**9  # of a file, unless another is asked for
CONFIG, INDEX = config_file.NAME, 'model.safetensors.index.json'


def check_empty(out: paths.Path):
  """Raises ValueError unless `out` is an empty folder or not there."""
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise ValueError(f'{out} is not an empty folder: choose another --out')


@contextlib.contextmanager
def made(out) -> Iterator[pathlib.Path]:
  """A folder of this machine, which becomes `out` when it is complete.

  In a bucket that is said by the config, which is the last to be uploaded.
  """
  if paths.in_bucket(out):
    with tempfile.TemporaryDirectory() as name:
      yield (folder := pathlib.Path(name))
      put = paths.filesystem(out).put_file
      for file in sorted(folder.iterdir(), key=lambda f: f.name == CONFIG):
        to = out / file.name
        retry.with_retries(lambda a=file, b=to: put(str(a), str(b)), to)
    return
  # A new name: what is there by another is not ours to delete.
  partial = out.with_name(f'{out.name}.{uuid.uuid4().hex}.partial')
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.replace(out)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def load(
  folder: paths.Path,
) -> tuple[config_lib.Config, Params, Float[np.ndarray, 'l e'] | None]:
  """Reads what `training.export` wrote, bit for bit.

  Returns:
    config, parameters, router's bias.

  Raises:
    ValueError: the folder holds other tensors, or not all of them.
  """
  config = config_file.read(folder)
  with opened(folder) as where:
    parts = names.tensors(config.model)
    slices = {name: file.get_slice(name) for name, file in where.items()}
    names.check(slices, parts, names.describe(config.model))
    tree = read(where, parts, config.model)
  return config, tree, tree.pop('router_bias', None)


def is_folder(folder: paths.Path) -> bool:
  """Whether a folder has a model's tensors."""
  return any((folder / n).exists() for n in ('model.safetensors', INDEX))


@contextlib.contextmanager
def opened(folder: paths.Path) -> Iterator[dict[str, safetensors.safe_open]]:
  """The tensors of a folder by name, and the open file that has each."""
  files_ = [folder / 'model.safetensors']
  if (folder / INDEX).exists():
    files_ = [folder / name for name in _files_of(folder / INDEX)]
  with contextlib.ExitStack() as stack:
    where = {}
    for file in files_:
      one = stack.enter_context(open_(stack.enter_context(files.here(file))))
      where |= dict.fromkeys(one.keys(), one)
    yield where


def read(where, parts: list[names.Tensor], model) -> Params:
  """The tree of a model, from the tensors of `opened`."""
  tree = jax.tree.map(
    lambda leaf: np.empty(leaf.shape, leaf.dtype), names.abstract(model)
  )
  for part in parts:
    part.read(where[part.name].get_tensor(part.name), names.at(tree, part.path))
  return tree


def _files_of(index: paths.Path) -> list[str]:
  """The files that an index names, all beside it."""
  weight_map = files.read_json(index).get('weight_map')
  names_ = weight_map.values() if isinstance(weight_map, dict) else [None]
  for name in names_:
    plain = isinstance(name, str) and re.fullmatch(r'[\w-][\w.-]*', name)
    if not plain or not name.endswith('.safetensors'):
      raise ValueError(
        f'{index} is damaged: its weight_map names {name!r}, which is no '
        'safetensors file beside it'
      )
  return sorted(set(names_))


def open_(file) -> safetensors.safe_open:
  """Opens a file; ValueError if it is none."""
  try:
    return safetensors.safe_open(file, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file} is not a safetensors file: {error}') from None


def write(
  folder: pathlib.Path,
  tree: Params,
  parts: list[names.Tensor],
  max_bytes: int,
  step: int,
):
  """Writes the tensors `parts` of a tree, in files of at most `max_bytes`."""
  groups, size = [[]], 0
  for part in parts:
    num_bytes = 4 * math.prod(part.shape)
    if groups[-1] and size + num_bytes > max_bytes:
      groups.append([])
      size = 0
    groups[-1].append(part)
    size += num_bytes
  weight_map = {}
  for number, group in enumerate(groups, 1):
    name = f'model-{number:05}-of-{len(groups):05}.safetensors'
    if len(groups) == 1:
      name = 'model.safetensors'
    # 'pt': matrices are [out, in], as in PyTorch.
    metadata = {'format': 'pt', 'step': str(step)}
    safetensors_numpy.save_file(
      names.written(group, tree), folder / name, metadata
    )
    shutil.copymode(folder / CONFIG, folder / name)  # readable by others
    weight_map |= dict.fromkeys((part.name for part in group), name)
  if len(groups) > 1:
    total = sum(4 * math.prod(part.shape) for part in parts)
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    files.replace(folder / INDEX, json.dumps(index, indent=2) + '\n')
