"""Connections from outside of this package: classes that a config names.

    connection.kind = 'my_design:Gated'      class Gated of my_design.py

Such a class is an `nnx.Module` that is made as Class(dim, num_streams, index),
where `index` counts the sub-layers and may be traced, with

    pre(x)            streams [..., n, d] -> what the sub-layer reads, context
    post(y, context)  what it returns -> streams

The context is a `Context`, from which probes read the mappings, if there are
any. An `advance`, `post` of the sub-layer before and `pre` of this one in one,
is used where there is one. docs/own_design.md follows one to its report.
"""

import importlib

from flax import nnx


def make(kind: str, dim: int, num_streams: int, index) -> nnx.Module:
  """The connection that 'module:Class' names.

  Raises:
    ValueError: there is no such class, or it is no connection.
  """
  found = load(kind)
  try:
    connection = found(dim, num_streams, index)
  except TypeError as error:
    raise ValueError(
      f'connection.kind={kind!r} cannot be made as Class(dim, num_streams, '
      f'index): {error}'
    ) from error
  return connection


def load(kind: str) -> type[nnx.Module]:
  """The class that 'module:Class' names; its module is imported.

  Raises:
    ValueError: there is no such class, or it is no connection.
  """
  module, _, name = kind.partition(':')
  try:
    found = getattr(importlib.import_module(module), name)
  except ImportError as error:
    raise ValueError(
      f'connection.kind={kind!r}: {error}: put the file beside the --config, '
      'or name its folder by PYTHONPATH'
    ) from None
  except AttributeError:
    raise ValueError(
      f'connection.kind={kind!r}: {module} has no {name}'
    ) from None
  if not (isinstance(found, type) and issubclass(found, nnx.Module)):
    raise ValueError(f'connection.kind={kind!r} is no flax.nnx.Module')
  for method in ('pre', 'post'):
    if not callable(getattr(found, method, None)):
      raise ValueError(
        f'connection.kind={kind!r} has no {method}: a connection needs '
        'pre(x) and post(y, context)'
      )
  return found
