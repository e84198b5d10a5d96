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

from mhc.axes import AXES, DATA
from mhc.model import parameters
from mhc.model import parts

TILE = 128  # columns
LARGEST_FACTOR = 23
MANY = 32  # tiles


def gather(params, specs, dtype, *, above: tuple[str, ...] = ()):
  """All-gathers the matrices of parameters that lie by `specs`; differentiable.

  Args:
    params: a tree of names, float32; inside a `shard_map`.
    specs: of its leaves. Dimensions that a `jax.lax.scan` has taken away are to
      be taken off them.
    dtype: of the activations, which matrices are used in.
    above: the names on the path from the root of the parameters to this tree.

  Returns:
    the tree; leaves that are not split are as they were.
  """

  def leaf(path, x, spec):
    if DATA not in spec or jax.lax.axis_size(DATA) == 1:
      return x
    names = (*above, *parameters.path_names(path))
    return _gather(x, spec.index(DATA), used_dtype(names, dtype))

  return jax.tree_util.tree_map_with_path(leaf, params, specs)


def scatter(grads, specs):
  """Sums over all devices that have the same part of a parameter.

  Args:
    grads: of whole matrices, float32, one device's.
    specs: of the parameters.
  """

  def leaf(x, spec):
    if DATA in spec:
      x = _scatter(x, spec.index(DATA))
    return psum_replicated(x, spec)

  return jax.tree.map(leaf, grads, specs)


@parts.part(parts.WEIGHTS)
def psum_replicated(x: jax.Array, spec) -> jax.Array:
  """The sum over the axes on which x is replicated."""
  axes = tuple(axis for axis in AXES if axis not in spec)
  return jax.lax.psum(x, axes) if axes else x


def used_dtype(names: tuple[str, ...], dtype):
  """The dtype that a parameter, by the names on its path, is used in."""
  _, row = parameters.locate(names)
  return jnp.dtype(dtype if row.used_in == 'activation' else jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@parts.part(parts.WEIGHTS)
def _gather(x, dim, dtype):
  return jax.lax.all_gather(x.astype(dtype), DATA, axis=dim, tiled=True)


def _gather_fwd(x, dim, dtype):
  return _gather(x, dim, dtype), None


def _gather_bwd(dim, dtype, _, g):
  del dtype
  return (_scatter(g.astype(jnp.float32), dim),)


_gather.defvjp(_gather_fwd, _gather_bwd)


@parts.part(parts.WEIGHTS)
def _scatter(x, dim):
  if x.ndim != 2:
    return _psum_scatter(x, dim)
  # The rest is small: the compiler may add it up on all devices.
  other = 1 - dim
  pieces = jnp.split(x, [_divisible(x.shape[other])], other)
  return jnp.concatenate(
    [_psum_scatter(piece, dim) for piece in pieces if piece.size], other
  )


def _psum_scatter(x, dim):
  return jax.lax.psum_scatter(x, DATA, scatter_dimension=dim, tiled=True)


def _divisible(size: int) -> int:
  """The most of `size` columns that TPUs sum up in parts.

  Where the number of tiles has a large prime factor, as 64,640 / 128 = 5 * 101
  has, libtpu 0.0.48 makes a sum over all devices of the reduce-scatter, of
  twice the bytes; for v6e also where hundreds of tiles are no multiple of 32.
  (2,560 rows over 64 devices. v5p: 101, 127, 249, 254, 333, 496, 992 tiles, not
  253, 300, 448, 480, 504, 600, 960; v6e: 504, 505, 600, 1000, 1008, not 192,
  320, 448, 480, 512, 640, 700, 768, 832, 896, 960.)
  """
  tiles = -(-size // TILE)
  step = MANY if tiles > 4 * MANY else 1
  found = tiles - tiles % step
  while _largest_factor(found) > LARGEST_FACTOR:
    found -= step
  return size if found == tiles else found * TILE


def _largest_factor(number: int) -> int:
  factor = 2
  while factor * factor <= number:
    if number % factor:
      factor += 1
    else:
      number //= factor
  return number
