"""The axes of the mesh, and over which of them a value varies.

Inside a `shard_map` JAX tracks in types over which axes a value differs between
devices ("varying manual axes"): operands of one operation must agree, and
autodiff sums over devices where a value that is the same on all of them meets
one that is not. Casting at a chosen place chooses where that sum is.
"""

import jax

DATA = 'data'  # splits the batch, and one dimension of every matrix
PIPE = 'pipe'  # splits the stack of blocks into stages
EXPERT = 'expert'  # splits the batch, and the experts of a layer
AXES = (DATA, PIPE, EXPERT)


def varying_axes(x) -> frozenset[str]:
  """The axes over which any leaf of x varies."""
  return frozenset().union(
    *(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(x))
  )


def cast_varying(x, axes):
  """Casts each leaf of x to vary over `axes` as well."""

  def leaf(leaf):
    absent = tuple(sorted(frozenset(axes) - jax.typeof(leaf).mat.varying))
    return jax.lax.pcast(leaf, absent, to='varying') if absent else leaf

  return jax.tree.map(leaf, x)


def cast_varying_everywhere(x):
  """Casts each leaf of x to one that may differ on any two devices."""
  return cast_varying(x, AXES)


def unify_varying(*arrays):
  """Casts all of them to vary over the same axes."""
  return cast_varying(arrays, varying_axes(arrays))
