"""Which implementation of an operation runs where.

    'xla'      plain JAX, everywhere
    'pallas'   the TPU kernels of this package

None takes the fastest that the platform has. The choice is made when a program
is lowered, so that it holds for a TPU that is compiled for from a CPU.
"""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float

from mhc import manifold
from mhc.kernels import sinkhorn as sinkhorn_lib

Implementation = Literal['xla', 'pallas']


def sinkhorn(
  logits: Float[Array, 'n n t'],
  num_iters: int,
  eps: float,
  implementation: Implementation | None = None,
) -> Float[Array, 'n n t']:
  """`manifold.sinkhorn_project` with its exact gradient, tokens minor.

  Raises:
    ValueError: an implementation that does not exist.
  """
  plain = functools.partial(
    manifold.sinkhorn_project, num_iters=num_iters, eps=eps, axes=(0, 1)
  )
  match implementation:
    case None:
      return jax.lax.platform_dependent(
        logits,
        tpu=lambda x: sinkhorn_lib.sinkhorn(x, num_iters, eps),
        default=plain,
      )
    case 'xla':
      return plain(logits)
    case 'pallas':
      return sinkhorn_lib.sinkhorn(logits, num_iters, eps)
  raise ValueError(
    f"implementation={implementation!r} must be None, 'xla' or 'pallas'"
  )
