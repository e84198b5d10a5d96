"""Meshes with Explicit axes, on which shardings are part of an array's type.

`jax.make_mesh` makes such meshes by default. There a contraction over a split
dimension, or a reshape that merges two, is an error unless the sharding of its
result is named. `call` runs a function with those axes Auto, as if XLA were to
choose, and names the shardings of its results alone.
"""

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def call(function: Callable, like, out_specs: Callable, *arguments):
  """Returns `function(*arguments)`, with Explicit axes as Auto ones.

  Args:
    function: of arrays, without side effects.
    like: the array whose mesh and sharding decide.
    out_specs: from the PartitionSpec of `like`, of full length, to the specs of
      the results, a tree of their structure.
    *arguments: trees of arrays.
  """
  sharding = jax.typeof(like).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return function(*arguments)
  missing = jax.typeof(like).ndim - len(sharding.spec)
  spec = PartitionSpec(*sharding.spec, *(None,) * missing)
  shardings = jax.tree.map(
    lambda spec: NamedSharding(sharding.mesh, spec),
    out_specs(spec),
    is_leaf=lambda each: isinstance(each, PartitionSpec),
  )
  return jax.sharding.auto_axes(function, out_sharding=shardings)(*arguments)


def merged(*entries) -> str | tuple[str, ...] | None:
  """The entry of a spec for one dimension made of several."""
  names = []
  for entry in entries:
    if entry is not None:
      names.extend((entry,) if isinstance(entry, str) else entry)
  return tuple(names) or None
