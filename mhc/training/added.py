"""What was added to a plain model, alone: its connections and adapters.

    connections.safetensors     their tensors, under the names of an export
    config.json                 of the run

A few hundredths of the model. They belong to one base, whose fingerprint the
file has: the sha256 of its tensors' bytes, in order of their names.
"""

import hashlib

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from mhc.interop import names
from mhc.interop import safetensors
from mhc.model import parameters
from mhc.runtime import config_file
from mhc.runtime import files
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import start
from mhc.training import vocabulary
from mhc.training import workdir as workdir_lib

FILE, BASE = 'connections.safetensors', 'base_sha256'


def export(
  workdir: paths.Path, out: paths.Path, given: str | None = None
) -> int:
  """Writes the connections and adapters of a run's newest checkpoint.

  Arguments, result and errors are those of `export.export`.
  """
  config, out = workdir_lib.read_config(workdir), paths.absolute(out)
  names.check_model(config.model)
  safetensors.check_empty(out)
  tokenizer = vocabulary.required(workdir, given)
  state = checkpoint.restore_model(workdir, jax.local_devices(backend='cpu')[0])
  tree = state.params | {'router_bias': state.router_bias}
  base, added = _parts(config.model)
  if not added:
    raise ValueError(
      f'{workdir} has neither connections nor adapters to write alone: '
      f'connection.kind={config.model.connection.kind!r}'
    )
  metadata = {BASE: _fingerprint(base, tree), 'step': str(int(state.step))}
  with safetensors.made(out) as partial:
    config_file.write(partial, config)
    vocabulary.write(partial, tokenizer)
    tensors = names.written(added, tree)
    safetensors_numpy.save_file(tensors, partial / FILE, metadata)
  return int(state.step)


def is_folder(folder: paths.Path) -> bool:
  """Whether a folder holds connections alone."""
  return (folder / FILE).exists()


def attach(base: start.Source, folder: paths.Path) -> start.Source:
  """A plain model with the connections and adapters of a folder.

  Raises:
    ValueError: they are of another base, or not whole.
  """
  model = workdir_lib.read_config(folder).model
  start.check_model(model, base.model, 'the base')
  of_base, added = _parts(model)
  with files.here(folder / FILE) as file, safetensors.open_(file) as opened:
    theirs = (opened.metadata() or {}).get(BASE)
    tree = base.params | {'router_bias': base.router_bias}
    if (ours := _fingerprint(of_base, tree)) != theirs:
      raise ValueError(
        f'{folder} was trained on other weights than these: their sha256 is '
        f'{str(theirs)[:12]}, these have {ours[:12]}'
      )
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    names.check(slices, added, names.describe(model))
    result = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype), names.abstract(model)
    )
    for part in added:
      part.read(opened.get_tensor(part.name), names.at(result, part.path))
  result.pop('router_bias', None)
  return start.Source(model, start.grafted(base, result), base.router_bias)


def _parts(model):
  """The tensors of the base, and of what was added to it."""
  both = [], []
  for part in names.tensors(model):
    found = parameters.locate(part.path)
    is_added = found is not None and found[1].part != 'base'
    both[is_added].append(part)
  return both


def _fingerprint(parts, tree):
  digest = hashlib.sha256()
  for part in sorted(parts):
    digest.update(part.write(names.at(tree, part.path)).tobytes())
  return digest.hexdigest()
