"""Numbers that the library gives on every version of JAX; prints them as JSON.

It imports no test library and takes no part of JAX that the library does not.
"""

import importlib.metadata
import json

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np

import mhc

DEPENDENCIES = ('flax', 'jax', 'jaxlib', 'numpy')


def numbers() -> dict[str, float]:
  """Gradients of a connection and of the projection, and a kernel's result."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 4, 128), jnp.float32)
  post = jax.jit(_post, static_argnums=1)
  project = jax.jit(jax.grad(_projection_loss), static_argnums=1)
  return {
    'connection': _norm(jax.jit(jax.grad(_connection_loss))(x)),
    'projection': _norm(project(x[..., :4], 'xla')),
    'projection, interpreted': _norm(project(x[..., :4], 'pallas')),
    'post, interpreted': _norm(post(x[0], 'pallas')),
    'shard_map': _norm(_on_two_devices(x)),
  }


def _connection_loss(x):
  first, second = (  # few iterations, for the sake of the compiler
    mhc.MHC(128, num_streams=4, index=index, sinkhorn_iters=3)
    for index in (0, 1)
  )
  h, context = first.pre(x)
  h, context = second.advance(jnp.tanh(h), context)
  return jnp.sum(jnp.sin(second.post(jnp.tanh(h), context)))


def _projection_loss(logits, implementation):
  projected = mhc.sinkhorn_project(logits, implementation=implementation)
  return jnp.sum(jnp.sin(3 * projected))


def _post(x, implementation):
  weights = jnp.moveaxis(x[:, :, :5], 0, -1)  # [4, 5, tokens]
  y, post, res = x[:, 0], weights[:, 4], weights[:, :4]
  return mhc.kernels.post(x, y, post, res, implementation)


def _on_two_devices(x):
  """The gradient through parameters that both devices share."""
  devices = np.array(jax.devices()[:2])
  mesh = Mesh(devices, ('data',), axis_types=(AxisType.Auto,))
  graph, params = nnx.split(mhc.MHC(128, 4, index=0, mixing='kronecker'))

  def loss(params, x):
    connection = nnx.merge(graph, params)
    h, context = connection.pre(x)
    out = connection.post(jnp.tanh(h), context)
    return jax.lax.psum(jnp.sum(jnp.sin(out)), 'data')

  sharded = jax.shard_map(
    loss, mesh=mesh, in_specs=(P(), P('data')), out_specs=P()
  )
  return jax.jit(jax.grad(sharded))(params, x)


def _norm(tree) -> float:
  return float(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


if __name__ == '__main__':
  versions = {name: importlib.metadata.version(name) for name in DEPENDENCIES}
  print(json.dumps({'versions': versions, 'numbers': numbers()}))
