"""The weights that a run starts from: another run's, or a trained model's.

`config.start_from` names a folder: a run's, one that launch/export.py or
launch/convert.py has written, or one of Hugging Face. A model of the same kind
gives all of its weights. A model with a plain residual gives a model of any
kind its sub-layers, whose connections are new, with one number other than in a
model from scratch: sub-layers read a sum of n equal streams with weights

    sigmoid(b) + (n - 1) sigmoid(-3) = 1,   b = logit(1 - (n - 1) sigmoid(-3)),

where from scratch b = 3 and the sum is 1.095 for n = 4. A norm without an eps
would not see it; trained models have norms with one.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from mhc import config as config_lib
from mhc.config import dicts
from mhc.interop import body
from mhc.interop import huggingface
from mhc.interop import safetensors
from mhc.model import parameters
from mhc.parallel.placement import Params, Placement
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import state as state_lib
from mhc.training import step as step_lib
from mhc.training import workdir as workdir_lib

MAPPED = {'phi', 'alpha', 'bias'}  # of a connection with dynamic mappings


class Source(NamedTuple):
  """A trained model in depth order, its arrays on the host."""

  model: config_lib.ModelConfig
  params: Params
  router_bias: Float[np.ndarray, 'l e'] | None


def model_of(folder: paths.Path) -> config_lib.ModelConfig:
  """The settings of the model in a folder.

  Raises:
    ValueError: there is none.
  """
  if not (folder / workdir_lib.CONFIG).exists():
    raise ValueError(
      f'{folder} holds no model: no {workdir_lib.CONFIG} of a run, of an '
      'export or of Hugging Face'
    )
  if huggingface.is_folder(folder):
    return huggingface.read_settings(folder)
  return workdir_lib.read_config(folder).model


def read(folder: paths.Path) -> Source:
  """Reads a model.

  Raises:
    ValueError: there is none, or it is not whole.
  """
  model = model_of(folder)
  if huggingface.is_folder(folder):
    return Source(*huggingface.load(folder))
  if (folder / workdir_lib.CHECKPOINTS).is_dir():
    cpu = jax.local_devices(backend='cpu')[0]
    state = checkpoint.restore_model(folder, cpu)
    params, bias = jax.tree.map(np.asarray, (state.params, state.router_bias))
    return Source(model, params, bias)
  if not safetensors.is_folder(folder):
    raise ValueError(
      f'{folder} has no model beside its {workdir_lib.CONFIG}: no checkpoint '
      'yet, or connections alone, which launch/convert.py puts onto their base '
      '(--connections)'
    )
  _, params, bias = safetensors.load(folder)
  return Source(model, params, bias)


def check(config: config_lib.Config):
  """Checks that a run's model can start from `config.start_from`.

  Raises:
    ValueError: there is no such model, or it is another.
  """
  if not config.start_from:
    return
  folder = paths.path(config.start_from)
  name = f'start_from={config.start_from}'
  check_model(config.model, model_of(folder), name)
  if not config.start_moments:
    return
  if not (folder / workdir_lib.CHECKPOINTS).is_dir():
    raise ValueError(
      f'start_moments=True takes the moments of a run: {folder} is none, or '
      'has no checkpoint yet'
    )
  theirs = workdir_lib.read_config(folder).optimizer
  for name in ('name', 'muon', 'trained'):
    ours, before = (getattr(one, name) for one in (config.optimizer, theirs))
    if ours != before:
      raise ValueError(
        f'start_moments=True, but the moments of {folder} are of '
        f'optimizer.{name}={before!r}, this run has {ours!r}'
      )


def check_model(
  ours: config_lib.ModelConfig, theirs: config_lib.ModelConfig, name: str
):
  """Checks that a model can take the weights of another.

  Raises:
    ValueError: it has another body or other connections; `name` says whose.
  """
  if found := body.difference(ours, theirs):
    raise ValueError(f'{name} does not fit: this model has {found}')
  kind, before = ours.connection.kind, theirs.connection.kind
  if before not in (kind, 'residual'):
    raise ValueError(
      f'{name} has connection.kind={before!r}, this model {kind!r}: '
      "it can start from its own kind or from 'residual'"
    )
  if before == kind:
    other = dicts.leaves(theirs.connection)
    for setting, value in dicts.leaves(ours.connection).items():
      if setting != 'implementation' and value != other[setting]:
        raise ValueError(
          f'{name} has connection.{setting}={other[setting]!r}, '
          f'this model {value!r}'
        )
  if theirs.adapter_rank and theirs.adapter_rank != ours.adapter_rank:
    raise ValueError(
      f'{name} has model.adapter_rank={theirs.adapter_rank}, this '
      f'model {ours.adapter_rank}: merge the adapters by launch/convert.py'
    )


def grafted(source: Source, params: Params) -> Params:
  """Fresh parameters with those that a source has in their place.

  Args:
    source: checked by `check_model`.
    params: in depth order; on devices, where the result lies as they do.

  Raises:
    ValueError: the source has a parameter that is not there, or of another
      shape.
  """
  found = {
    parameters.path_names(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(source.params)
  }

  def taken(path, leaf):
    value = found.pop(parameters.path_names(path), None)
    if value is None:
      return leaf
    if value.shape != leaf.shape:
      raise ValueError(
        f'{"/".join(parameters.path_names(path))} has the shape {value.shape}, '
        f'this model has {leaf.shape}'
      )
    return _like(value, leaf)

  tree = jax.tree_util.tree_map_with_path(taken, params)
  if found:
    raise ValueError(f'this model has no {"/".join(next(iter(found)))}')
  return tree


def state(
  config: config_lib.Config, step: step_lib.Step
) -> state_lib.TrainState:
  """The state of a run before its first step."""
  fresh = step.init(config.seed)
  if not config.start_from:
    return fresh
  source = read(paths.path(config.start_from))
  fresh = step.to_depth_order(fresh)
  bias = fresh.router_bias
  if source.router_bias is not None:
    bias = _like(source.router_bias, bias)
  params = grafted(source, _read_whole(source, config.model, fresh.params))
  moments = fresh.opt_state
  if config.start_moments:
    moments = _with_moments(config, step, moments)
  return step.to_pipeline_order(
    fresh._replace(params=params, opt_state=moments, router_bias=bias)
  )


def _with_moments(config, step, fresh):
  """A fresh optimiser's state, with what the run's before has in its place."""
  folder = paths.path(config.start_from)
  theirs = dataclasses.replace(
    workdir_lib.read_config(folder), mesh=config.mesh, data=config.data
  )
  abstract = state_lib.abstract_saved(Placement(theirs, step.mesh))
  saved = checkpoint.restore(folder, abstract).opt_state
  found = {
    parameters.path_names(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(saved)
  }
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: found.get(parameters.path_names(path), leaf), fresh
  )


def convert(
  source: Source, model: config_lib.ModelConfig, seed: int = 0
) -> Source:
  """A source as another model, on the host, connections from a seed."""
  check_model(model, source.model, 'the model')
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    fresh = _read_whole(source, model, _drawn(model)(jax.random.key(seed)))
  params = grafted(source, jax.tree.map(np.asarray, fresh))
  return Source(model, params, source.router_bias)


@functools.lru_cache(maxsize=8)
def _drawn(model):
  """A program that draws parameters, compiled once for all seeds."""
  return jax.jit(lambda key: state_lib.initial_parameters(model, key))


def _read_whole(source, model, params):
  """Fresh parameters, by which equal streams are read as what they are."""
  if source.model.connection.kind != 'residual':
    return params
  return jax.jit(lambda tree: _with_whole_reads(tree, model))(params)


def _with_whole_reads(tree, model):
  """The tree with b as above, in whatever has phi, alpha and bias."""
  n = model.connection.streams
  if tree.keys() >= MAPPED and model.connection.init == 'mhc' and n > 1:
    read = tree['bias'][..., :n]
    share = jax.nn.sigmoid(read)
    largest = jnp.max(share, axis=-1, keepdims=True)
    rest = jnp.sum(share, axis=-1, keepdims=True) - largest
    whole = jnp.where(share == largest, jax.scipy.special.logit(1 - rest), read)
    # From n = 22 on the others alone read more than one.
    whole = jnp.where(rest < 1, whole, read)
    bias = jnp.concatenate([whole, tree['bias'][..., n:]], axis=-1)
    return tree | {'bias': bias}
  return {
    name: _with_whole_reads(leaf, model) if isinstance(leaf, dict) else leaf
    for name, leaf in tree.items()
  }


def _like(value, leaf):
  """A host's array where and as another lies."""
  value = np.asarray(value, leaf.dtype)
  if isinstance(leaf, np.ndarray):
    return value
  return jax.make_array_from_callback(
    value.shape, leaf.sharding, lambda index: value[index]
  )
