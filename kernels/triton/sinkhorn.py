"""`sinkhorn` as Triton kernels: 2 n^2 numbers a token, 3 n^2 backward."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import triton

from mhc.kernels.triton import launch
from mhc.kernels.triton import sinkhorn_kernels as kernels

TOKENS = 128  # of a program of four warps: one a thread
SEGMENT = 4  # iterations whose divisors the backward kernel keeps


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def sinkhorn(
  logits: Float[Array, 'n n t'], num_iters: int, eps: float
) -> Float[Array, 'n n t']:
  """`manifold.sinkhorn_project` of [n, n, t], float32, tokens minor."""
  return launch.run(forward(logits, num_iters, eps), logits)[0]


def _vjp_forward(logits, num_iters, eps):
  return sinkhorn(logits, num_iters, eps), logits


def _vjp_backward(num_iters, eps, logits, cotangent):
  return launch.run(backward(logits, num_iters, eps), logits, cotangent)


sinkhorn.defvjp(_vjp_forward, _vjp_backward)


def forward(logits, num_iters, eps):
  return _launch(kernels.sinkhorn_forward, logits, num_iters, eps)


def backward(logits, num_iters, eps):
  return _launch(
    kernels.sinkhorn_backward, logits, num_iters, eps, SEGMENT=SEGMENT
  )


def _launch(kernel, logits, num_iters, eps, **constants):
  n, _, num_tokens = logits.shape
  return launch.Launch(
    kernel,
    (triton.cdiv(num_tokens, TOKENS),),
    (jax.ShapeDtypeStruct(logits.shape, jnp.float32),),
    {
      'num_tokens': num_tokens,
      'N': n,
      'NUM_ITERS': num_iters,
      'EPS': float(eps),
      'TOKENS': TOKENS,
      **constants,
    },
    num_warps=4,
  )
