"""The operations, and which implementation of them runs where.

    'xla'      plain JAX, on every platform
    'autodiff' plain JAX without gradients of its own: for forward mode
    'pallas'   TPU kernels; interpreted on other machines
    'triton'   GPU kernels, with jax-triton installed

None takes the fastest that the platform has and that can serve the call. The
platform is that of the mesh around the call (`shard_map`, `jax.set_mesh`), so
that a program that is compiled for a TPU from a CPU has its kernels; without a
mesh it is that of the default device.

Every operation raises ValueError for an implementation that does not exist, and
NotImplementedError, with the reason, if the one that was named cannot serve the
call.
"""

from collections.abc import Callable
import functools
import importlib
import typing
from typing import Literal

from absl import logging
import jax
from jaxtyping import Array, Float

from mhc.kernels import operands
from mhc.kernels import platform as platform_lib

Implementation = Literal['xla', 'pallas', 'triton', 'autodiff']

# The paper's Eq. 9: t_max = 20 iterations of exact divisions. DeepSeek-V4's
# kernels add eps = 1e-6 to entries and divisors.
SINKHORN_ITERS = 20
SINKHORN_EPS = 0.0

# By platform, the fastest first; others have plain JAX alone.
_PREFERENCES = {'tpu': ('pallas', 'xla'), 'gpu': ('triton', 'xla')}
_INSTALL = "pip install 'mhc-jax[triton]'"


def sinkhorn(
  logits: Float[Array, 'n n t'],
  num_iters: int = SINKHORN_ITERS,
  eps: float = SINKHORN_EPS,
  implementation: Implementation | None = None,
) -> Float[Array, 'n n t']:
  """`mhc.sinkhorn_project` of float32 logits, tokens minor."""
  return _dispatch('sinkhorn', implementation)(logits, num_iters, eps)


def pre(
  x: Float[Array, 't n d'],
  phi: Float[Array, 'nd k'],
  alpha: Float[Array, ''],
  bias: Float[Array, 'n'],
  norm_eps: float,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, 't d'], Float[Array, 'k t']]:
  """`reference.pre`: what the sub-layer reads, and the projection z."""
  return _dispatch('pre', implementation)(x, phi, alpha, bias, norm_eps)


def post(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
  implementation: Implementation | None = None,
) -> Float[Array, 't n d']:
  """`reference.post`: the streams behind a sub-layer; res=None stands for I."""
  return _dispatch('post', implementation)(x, y, post, res)


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
  serve = _dispatch('advance', implementation)
  return serve(x, y, post, res, phi, alpha, bias, norm_eps)


def collapse(
  x: Float[Array, 't n d'],
  y: Float[Array, 't d'],
  post: Float[Array, 'n t'],
  res: Float[Array, 'n n t'] | None,
  implementation: Implementation | None = None,
) -> Float[Array, 't d']:
  """`reference.collapse`: the sum of the streams behind the last sub-layer."""
  return _dispatch('collapse', implementation)(x, y, post, res)


def defers_post(implementation: Implementation | None) -> bool:
  """Whether `advance` is one pass over the streams, by a kernel.

  Plain JAX gains nothing by that pass and would keep the streams twice for the
  backward pass: there a sub-layer's output is written back at once.
  """
  return (implementation or preferred()[0]) not in ('xla', 'autodiff')


def check(
  implementation: str, x: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh
):
  """Checks that an implementation can serve streams x, [t, n, d], on a mesh.

  Raises:
    ValueError: it cannot, with the reason.
  """
  platform = mesh.devices.flat[0].platform
  try:
    if implementation in ('pallas', 'triton'):
      _ops(implementation)
      operands.check(x)
    if implementation == 'triton' and platform != 'gpu':
      raise NotImplementedError(f'there is no GPU, but {platform}')
  except NotImplementedError as reason:
    raise ValueError(
      f'connection.implementation={implementation!r} cannot serve this model: '
      f"{reason}; 'auto' falls back to plain JAX"
    ) from None


def supports_vma(implementation: str, mesh: jax.sharding.Mesh) -> bool:
  """Whether calls carry the mesh axes over which their operands vary.

  Those of jax-triton do not, nor those of the interpreter that runs the TPU
  kernels elsewhere: a `shard_map` around them must not check these axes.
  """
  platform = mesh.devices.flat[0].platform
  if implementation == 'auto':
    implementation = preferred(platform)[0]
  interpreted = implementation == 'pallas' and platform != 'tpu'
  return implementation != 'triton' and not interpreted


def _dispatch(operation, implementation) -> Callable:
  """The function that serves an operation."""
  if implementation is None:
    names = preferred()
    if len(names) > 1:
      return functools.partial(_fall_back, operation, names)
    (implementation,) = names
  if implementation not in typing.get_args(Implementation):
    raise ValueError(
      f'implementation={implementation!r} must be None or one of '
      f'{typing.get_args(Implementation)}'
    )
  return getattr(_ops(implementation), operation)


def _fall_back(operation, names, *arguments):
  """Falls back from kernels to plain JAX, which serves every call."""
  *kernels, last = names
  for name in kernels:
    try:
      return getattr(_ops(name), operation)(*arguments)
    except NotImplementedError as reason:
      _warn_once(f'{operation} runs without its {name} kernel: {reason}')
  return getattr(_ops(last), operation)(*arguments)


def preferred(platform: str | None = None) -> tuple[str, ...]:
  """What None chooses from, the fastest first, here or on a platform."""
  names = _PREFERENCES.get(platform or platform_lib.platform(), ('xla',))
  if 'triton' in names and (reason := _why_no_triton()):
    _warn_once(f'the GPU kernels are not used: {reason}')
    return ('xla',)
  return names


@functools.cache
def _why_no_triton() -> str | None:
  try:
    importlib.import_module('jax_triton')
  except Exception as error:  # that of another JAX may end anyhow
    return f'{_INSTALL} ({type(error).__name__}: {error})'
  return None


def _ops(implementation):
  """The module of an implementation, loaded when it is first asked for."""
  try:
    return importlib.import_module(f'mhc.kernels.{implementation}.ops')
  except ImportError as error:
    if implementation != 'triton':
      raise
    raise NotImplementedError(
      f'the GPU kernels need {_INSTALL} ({error})'
    ) from None


@functools.cache
def _warn_once(message):
  logging.warning(message)
