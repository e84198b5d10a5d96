"""Matrices that are split over `data`: put together for use, gradients summed.

Fully sharded data parallelism: of a matrix each device keeps one part, with
that part of the gradient and of the optimiser's state. `all_gather` brings the
matrix together in the dtype that it is used in, half the bytes for bfloat16;
its transpose sums the devices' gradients and leaves each its own part, in
float32.
"""

import functools

import jax
import jax.numpy as jnp

from mhc.parallel import mesh as mesh_lib

# The leaf names of matrices that are used in the activations' dtype. The
# router's is not, see `precision`.
CAST = ('weight', 'gate', 'up', 'down', 'table')


def gather(params, specs, dtype):
  """Whole matrices, of parameters that lie by `specs`; differentiable.

  Args:
    params: a tree of names, float32; inside a `shard_map`.
    specs: of its leaves. Dimensions that a `jax.lax.scan` has taken away are to
      be taken off them.
    dtype: of the activations, which matrices are used in.

  Returns:
    the tree; leaves that are not split are as they were.
  """

  def leaf(path, x, spec):
    if mesh_lib.DATA not in spec or jax.lax.axis_size(mesh_lib.DATA) == 1:
      return x
    return _gather(x, spec.index(mesh_lib.DATA), used_dtype(path, dtype))

  return jax.tree_util.tree_map_with_path(leaf, params, specs)


def scatter(grads, specs):
  """Sums over all devices that have the same part of a parameter.

  Args:
    grads: of whole matrices, float32, one device's.
    specs: of the parameters.
  """

  def leaf(x, spec):
    if mesh_lib.DATA in spec:
      x = _scatter(x, spec.index(mesh_lib.DATA))
    return over_others(x, spec)

  return jax.tree.map(leaf, grads, specs)


def over_others(x: jax.Array, spec) -> jax.Array:
  """The sum over the axes that do not split x."""
  axes = tuple(axis for axis in mesh_lib.AXES if axis not in spec)
  return jax.lax.psum(x, axes) if axes else x


def used_dtype(path, dtype):
  """The dtype that a parameter, by its path in a tree, is used in."""
  names = [entry.key for entry in path]
  cast = names[-1] in CAST and 'router' not in names
  return jnp.dtype(dtype) if cast else jnp.dtype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, dim, dtype):
  return jax.lax.all_gather(
    x.astype(dtype), mesh_lib.DATA, axis=dim, tiled=True
  )


def _gather_fwd(x, dim, dtype):
  return _gather(x, dim, dtype), None


def _gather_bwd(dim, dtype, _, g):
  del dtype
  return (_scatter(g.astype(jnp.float32), dim),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _scatter(x, dim):
  return jax.lax.psum_scatter(
    x, mesh_lib.DATA, scatter_dimension=dim, tiled=True
  )
