"""What an optimiser has to know of connections: which parameters decay.

    tx = optax.adamw(1e-3, mask=mhc.optimizer.decayed)

In a connection phi and theta decay, which make the mappings depend on the
token; biases and alpha, whose zeros are no special mappings, and HC's gain do
not.
"""

from collections.abc import Callable
from typing import Any

import jax

# A connection is a set of siblings with exactly these names.
CONNECTIONS = (
  frozenset(('phi', 'alpha', 'bias')),  # MHC, and a learned Collapse
  frozenset(
    (
      *('gain', 'theta_pre', 'theta_post', 'theta_res', 'alpha'),
      *('bias_pre', 'bias_post', 'bias_res'),
    )
  ),  # HC
)
DECAYED = frozenset(('phi', 'theta_pre', 'theta_post', 'theta_res'))
# By which Flax's variables hold their arrays.
_WRAPPERS = ('value', 'raw_value')


def is_matrix(path: tuple[str, ...], leaf: Any) -> bool:
  """Whether a parameter has two dimensions or more."""
  del path
  return leaf.ndim >= 2


def decayed(
  params: Any, rest: Callable[[tuple[str, ...], Any], bool] = is_matrix
) -> Any:
  """The mask of weight decay: a tree of booleans.

  Args:
    params: a tree of arrays with names: an nnx module, an `nnx.State`, a pure
      dict, Linen's, or those that Flax's optimiser hands to optax.
    rest: from the names on the way to a parameter that is no connection's, and
      the parameter, to whether it decays.
  """
  connections = in_connections(params)

  def decays(path, leaf):
    names = path_names(path)
    if names in connections:
      return names[-1] in DECAYED
    return bool(rest(names, leaf))

  return jax.tree_util.tree_map_with_path(decays, params)


def in_connections(params: Any) -> frozenset[tuple[str, ...]]:
  """The paths, as names, of the parameters that belong to connections."""
  siblings: dict[tuple[str, ...], set[str]] = {}
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    *parent, name = path_names(path)
    siblings.setdefault(tuple(parent), set()).add(name)
  return frozenset(
    (*parent, name)
    for parent, names in siblings.items()
    if names in CONNECTIONS
    for name in names
  )


def path_names(path: tuple) -> tuple[str, ...]:
  """The names on the way to a leaf, without those that Flax adds."""
  names = []
  for key in path:
    for attribute in ('key', 'name', 'idx'):
      if hasattr(key, attribute):
        names.append(str(getattr(key, attribute)))
        break
    else:
      names.append(str(key))
  while len(names) > 1 and names[-1] in _WRAPPERS:
    names.pop()
  return tuple(names)
