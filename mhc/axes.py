"""The axes of the mesh, and over which of them a value varies.

Inside a `shard_map` JAX tracks in types over which axes a value differs between
devices ("varying manual axes"): operands of one operation must agree, and
autodiff sums over devices where a value that is the same on all of them meets
one that is not. Casting at a chosen place chooses where that sum is.

JAX has renamed all of this since 0.7.2, the oldest version that the library
runs on: other files ask this one, and know no version.
"""

import jax

DATA = 'data'  # splits the batch, and one dimension of every matrix
PIPE = 'pipe'  # splits the stack of blocks into stages
EXPERT = 'expert'  # splits the batch, and the experts of a layer
AXES = (DATA, PIPE, EXPERT)


def varying_axes(x) -> frozenset[str]:
  """The axes over which any leaf of x varies."""
  return frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(x)))


def cast_varying(x, axes):
  """Casts each leaf of x to vary over `axes` as well."""

  def leaf(leaf):
    absent = tuple(sorted(frozenset(axes) - _varying(leaf)))
    return _cast(leaf, absent) if absent else leaf

  return jax.tree.map(leaf, x)


def cast_varying_everywhere(x):
  """Casts each leaf of x to one that may differ on any two devices."""
  return cast_varying(x, AXES)


def unify_varying(*arrays):
  """Casts all of them to vary over the same axes."""
  return cast_varying(arrays, varying_axes(arrays))


def struct_varying_as(x, shape, dtype) -> jax.ShapeDtypeStruct:
  """The type of a kernel's output that varies over the axes that x does."""
  if hasattr(jax.typeof(x), 'mat'):
    options = {'manual_axis_type': jax.typeof(x).mat}
  else:
    options = {'vma': _varying(x)}
  return jax.ShapeDtypeStruct(shape, dtype, **options)


def _varying(leaf) -> frozenset[str]:
  kind = jax.typeof(leaf)
  return kind.mat.varying if hasattr(kind, 'mat') else kind.vma


def _cast(leaf, axes):
  if hasattr(jax.lax, 'pcast'):
    return jax.lax.pcast(leaf, axes, to='varying')
  return jax.lax.pvary(leaf, axes)
