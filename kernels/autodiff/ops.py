"""The operations without gradients of their own: JAX differentiates them.

In any mode and to any order, as `jax.jvp`, `jax.hessian` and Hessian-vector
products by forward over reverse need it. They keep and move more than the other
implementations, and are the same functions.
"""

import jax
import jax.numpy as jnp

from mhc.kernels import operands
from mhc.kernels.xla import sinkhorn as sinkhorn_lib

HIGHEST = jax.lax.Precision.HIGHEST

sinkhorn = sinkhorn_lib.unrolled


def normed_projection(x, phi, norm_eps):
  flat = _flat(x)
  square = jnp.mean(flat * flat, axis=-1, keepdims=True)
  raw = jnp.matmul(flat, phi, precision=HIGHEST)
  return raw * jax.lax.rsqrt(square + norm_eps)


def read(x, weights):
  wide = x.astype(jnp.float32)
  h = jnp.einsum('jt,tjd->td', weights, wide, precision=HIGHEST)
  return h.astype(x.dtype)


def pre(x, phi, alpha, bias, norm_eps):
  z = normed_projection(x, phi, norm_eps).T
  weights = jax.nn.sigmoid(z[: x.shape[1]] * alpha + bias[:, None])
  return read(x, weights), z


def post(x, y, post, res):
  return _written(x, y, post, res).astype(x.dtype)


def advance(x, y, post_weights, res, phi, alpha, bias, norm_eps):
  x = post(x, y, post_weights, res)
  return x, *pre(x, phi, alpha, bias, norm_eps)


def collapse(x, y, post, res):
  return jnp.sum(_written(x, y, post, res), axis=1).astype(x.dtype)


def _written(x, y, post, res):
  res = operands.res_or_identity(post, res)
  wide, out = x.astype(jnp.float32), y.astype(jnp.float32)
  mixed = jnp.einsum('ijt,tjd->tid', res, wide, precision=HIGHEST)
  return mixed + post.T[..., None] * out[:, None]


def _flat(x):
  return x.astype(jnp.float32).reshape(len(x), x.shape[1] * x.shape[2])
