"""Over which axes of a mesh a value varies, inside a `shard_map`.

JAX tracks it in types: operands of one operation must agree, and autodiff sums
over devices where a value that is the same on all of them meets one that is
not. Casting at a chosen place chooses where that sum is.
"""

import jax


def over(x) -> frozenset[str]:
  """The axes over which any leaf of x varies."""
  return frozenset().union(
    *(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(x))
  )


def vary(x, axes):
  """x, each leaf varying over `axes` and what it varies over already."""

  def leaf(leaf):
    absent = tuple(sorted(frozenset(axes) - jax.typeof(leaf).mat.varying))
    return jax.lax.pcast(leaf, absent, to='varying') if absent else leaf

  return jax.tree.map(leaf, x)


def together(*arrays):
  """All of them varying over the same axes."""
  return vary(arrays, over(arrays))
