r"""Checksums of the bits of arrays, independent of how they are sharded.

With the array's elements as unsigned integers u_i of 32 bits (wider ones as
several, narrower ones widened) at their index i in row-major order,

    checksum = sum_i mix(u_i + mix(i + salt))  mod 2^32

for two salts, where `mix` is a bijection of 32 bits in which every bit of the
input reaches every bit of the output (murmur3's finaliser). Sums of integers
have no rounding and no order, so every mesh gives the same number for a sharded
array. A flipped bit always changes it; other corruption goes unnoticed once in
2^64.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, UInt32
import numpy as np

SALTS = (0x9E3779B9, 0x7F4A7C15)
# Bytes up to which numpy is faster than compiling a program for all arrays.
ON_HOST = 1 << 26


def tree_checksums(tree: Any) -> dict[str, str]:
  """Maps the path of every array of a tree to 16 hexadecimal digits.

  The arrays may be sharded over processes; all must call it.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  arrays = [leaf for _, leaf in leaves]
  if (
    all(array.is_fully_addressable for array in arrays)
    and sum(array.nbytes for array in arrays) <= ON_HOST
  ):
    found = [*map(host_checksum, jax.device_get(arrays))]
  else:
    found = jax.device_get(_program(_replicated(arrays[0].sharding))(arrays))
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): ''.join(
      f'{part:08x}' for part in digits.tolist()
    )
    for (path, _), digits in zip(leaves, found, strict=True)
  }


@functools.cache
def _program(sharding):
  return jax.jit(
    lambda leaves: jnp.stack([*map(array_checksum, leaves)]),
    out_shardings=sharding,
  )


def _replicated(sharding):
  """The sharding of a result that every process can read."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return None


def array_checksum(x: Array) -> UInt32[Array, '2']:
  """The checksum of an array of any number of dimensions and type."""
  words = _words(x)
  index = _index(words.shape)
  return jnp.stack(
    [
      jnp.sum(_mix(words + _mix(index + np.uint32(salt))), dtype=jnp.uint32)
      for salt in SALTS
    ]
  )


def host_checksum(x: np.ndarray) -> np.ndarray:
  """`array_checksum` of an array on the host, uint32 [2]."""
  flat = np.ascontiguousarray(x).reshape(-1)
  if flat.dtype != np.bool_:
    flat = flat.view({1: np.uint8, 2: np.uint16}.get(x.itemsize, np.uint32))
  words = flat.astype(np.uint32)
  index = np.arange(words.size, dtype=np.uint32)
  return np.stack(
    [
      np.sum(_mix(words + _mix(index + np.uint32(salt))), dtype=np.uint32)
      for salt in SALTS
    ]
  )


def _words(x):
  """The bits of x as uint32; wider types have one more dimension."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  size = x.dtype.itemsize
  bits = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)


def _index(shape):
  """Row-major positions mod 2^32, uint32."""
  strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  terms = (
    jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    * np.uint32(stride % 2**32)
    for axis, stride in enumerate(strides)
  )
  return functools.reduce(jnp.add, terms, jnp.zeros(shape, jnp.uint32))


def _mix(x):
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))
