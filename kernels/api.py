"""Which implementation of an operation runs where.

    'xla'      plain JAX, everywhere
    'pallas'   the TPU kernels of this package; interpreted on other machines
    'triton'   the GPU kernels of this package; to be asked for by name: they
               compile for GPUs and agree with the reference in Triton's
               interpreter, but have not run on a GPU yet

None takes the fastest that the platform has and that can serve the call. The
platform is that of the mesh around the call (`shard_map`, `jax.set_mesh`), so
that a program that is compiled for a TPU from a CPU has its kernels; without a
mesh it is that of the default device.
"""

import functools
import importlib
import typing
from typing import Literal

from absl import logging
import jax
from jaxtyping import Array, Float

from mhc.kernels import operands
from mhc.kernels import platform as platform_lib
from mhc.kernels.pallas import ops as pallas
from mhc.kernels.xla import ops as xla

Implementation = Literal['xla', 'pallas', 'triton']


def sinkhorn(
  logits: Float[Array, 'n n t'],
  num_iters: int,
  eps: float,
  implementation: Implementation | None = None,
) -> Float[Array, 'n n t']:
  """`manifold.sinkhorn_project` with its exact gradient, tokens minor.

  Raises:
    ValueError: an implementation that does not exist.
    NotImplementedError: the one that was named cannot serve the call, and why.
  """
  return _first_that_serves('sinkhorn', implementation, logits, num_iters, eps)


def pre(
  x: Float[Array, 't n d'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, 't d'], Float[Array, 'k t']]:
  """`reference.pre`: what the sub-layer reads, and the projection z."""
  return _first_that_serves(
    'pre', implementation, x, phi, alpha, bias, norm_eps
  )


def post(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
  implementation: Implementation | None = None,
) -> Float[Array, 't n d']:
  """`reference.post`: the streams behind a sub-layer; res=None stands for I."""
  return _first_that_serves('post', implementation, x, y, post, res)


def advance(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, 't n d'], Float[Array, 't d'], Float[Array, 'k t']]:
  """`reference.advance`: `post`, then `pre` of the next sub-layer."""
  return _first_that_serves(
    'advance', implementation, x, y, post, res, phi, alpha, bias, norm_eps
  )


def collapse(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
  implementation: Implementation | None = None,
) -> Float[Array, 't d']:
  """`reference.collapse`: the sum of the streams behind the last sub-layer."""
  return _first_that_serves('collapse', implementation, x, y, post, res)


def fuses(implementation: Implementation | None) -> bool:
  """Whether `advance` is one pass over the streams, by a kernel."""
  names = _PREFERENCES.get(platform_lib.platform(), ('xla',))
  return (implementation or names[0]) != 'xla'


def check(
  implementation: str, x: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh
):
  """Refuses an implementation that cannot serve streams x, [t, n, d].

  Raises:
    ValueError: with the reason.
  """
  platform = mesh.devices.flat[0].platform
  try:
    if implementation in ('pallas', 'triton'):
      _module(implementation)
      operands.check(x)
    if implementation == 'triton' and platform != 'gpu':
      raise NotImplementedError(f'there is no GPU, but {platform}')
  except NotImplementedError as reason:
    raise ValueError(
      f'connection.implementation={implementation!r} cannot serve this model: '
      f"{reason}; 'auto' falls back to plain JAX"
    ) from None


def knows_axes(implementation: str, mesh: jax.sharding.Mesh) -> bool:
  """Whether calls carry which axes of a mesh their operands vary over.

  jax-triton's do not, nor those of the interpreter that runs the TPU kernels
  elsewhere: a `shard_map` around them must not check it.
  """
  platform = mesh.devices.flat[0].platform
  interpreted = implementation == 'pallas' and platform != 'tpu'
  return implementation != 'triton' and not interpreted


def _first_that_serves(operation, implementation, *arguments):
  if implementation is None:
    names = _PREFERENCES.get(platform_lib.platform(), ('xla',))
  elif implementation in typing.get_args(Implementation):
    names = (implementation,)
  else:
    raise ValueError(
      f'implementation={implementation!r} must be None or one of '
      f'{typing.get_args(Implementation)}'
    )
  for name in names:
    try:
      return getattr(_module(name), operation)(*arguments)
    except NotImplementedError as reason:
      if implementation is not None:
        raise
      _note(f'{operation} runs without its {name} kernel: {reason}')
  raise AssertionError('xla serves every call')


_PREFERENCES = {'tpu': ('pallas', 'xla')}


def _module(name):
  if name == 'triton':
    try:
      return importlib.import_module('mhc.kernels.triton.ops')
    except ImportError as error:
      raise NotImplementedError(
        f"the GPU kernels need pip install jax-triton 'triton<3.10' ({error})"
      ) from None
  return {'xla': xla, 'pallas': pallas}[name]


@functools.cache
def _note(message):
  """Logs a message once."""
  logging.warning(message)
