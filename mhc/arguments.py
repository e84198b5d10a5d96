"""Checks of the arguments of connections, before anything is computed."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def check_place(dim, num_streams, index):
  """Checks the three numbers that place a connection in a network.

  Raises:
    ValueError: one is no whole number, or too small. `index` may be traced.
  """
  got = f'dim={dim!r}, num_streams={num_streams!r}, index={index!r}'
  traced = isinstance(index, jax.core.Tracer)
  whole = jnp.issubdtype(index.dtype, jnp.integer) if traced else _whole(index)
  if not (_whole(dim) and _whole(num_streams) and whole):
    raise ValueError(f'a connection is placed by whole numbers, got {got}')
  if dim < 1 or num_streams < 1 or not (traced or index >= 0):
    raise ValueError(
      'a connection needs dim and num_streams of at least 1 and an index of at '
      f'least 0, in this order, got {got}'
    )


def check_streams(x, num_streams: int, dim: int):
  """Checks streams.

  Raises:
    ValueError: x is no [..., num_streams, dim] of real floating numbers.
  """
  if x.shape[-2:] != (num_streams, dim) or not _floating(x):
    raise ValueError(
      f'this connection has {num_streams} streams of width {dim}, got x of '
      f'shape {x.shape} and dtype {x.dtype}: open streams once, with expand, '
      'before the first sub-layer'
    )


def check_output(y, x, mappings):
  """Checks what a sub-layer returns against what it has read.

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  if y.dtype != x.dtype:
    raise ValueError(
      f'the sub-layer returned {y.dtype}, the streams are {x.dtype}: '
      'cast its output'
    )
  if y.shape != (*x.shape[:-2], x.shape[-1]):
    raise ValueError(
      f'the sub-layer returned the shape {y.shape}, the streams of its context '
      f'are {x.shape}: it must return {(*x.shape[:-2], x.shape[-1])}, and the '
      'context be the one that came with its input'
    )
  if mappings is not None:
    want = x.shape[-2], math.prod(x.shape[:-2])
    if mappings.post.shape != want:
      raise ValueError(
        f'the context has streams of shape {x.shape} and mappings of shape '
        f'{mappings.post.shape}, not {want}: both must be of the same tokens'
      )


def _whole(number):
  """Whether it is an integer, of Python, NumPy or JAX."""
  dtype = getattr(number, 'dtype', None)
  if dtype is None:
    return isinstance(number, int) and not isinstance(number, bool)
  return jnp.issubdtype(dtype, jnp.integer) and np.ndim(number) == 0


def _floating(x):
  return jnp.issubdtype(x.dtype, jnp.floating)
