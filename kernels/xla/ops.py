"""The operations in plain JAX, on every platform.

`mhc.kernels.reference` defines them and `mhc.kernels.api` has the arguments.
Results are marked where they arise: what an operation hands to the next and
what it keeps for its own gradient must be one tensor.
"""

import jax
import jax.numpy as jnp

from mhc import precision
from mhc.kernels.xla import sinkhorn as sinkhorn_lib
from mhc.kernels.xla import streams

sinkhorn = sinkhorn_lib.sinkhorn


def pre(x, phi, alpha, bias, norm_eps):
  z = streams.normed_projection(x, phi, norm_eps).T
  z = precision.mark('mapping_logits', z)
  weights = jax.nn.sigmoid(z[: x.shape[1]] * alpha + bias[:, None])
  return precision.mark('sublayer_input', streams.read(x, weights)), z


def post(x, y, post, res):
  return precision.mark('streams', streams.write(x, y, post, res))


def advance(x, y, post_weights, res, phi, alpha, bias, norm_eps):
  x = post(x, y, post_weights, res)
  return x, *pre(x, phi, alpha, bias, norm_eps)


def collapse(x, y, post, res):
  return jnp.sum(streams.write(x, y, post, res), axis=1)
