"""Numbers that the library gives on every version of JAX; prints them as JSON.

It imports no test library and takes no part of JAX that the library does not.
"""

import importlib.metadata
import json

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import mhc

DEPENDENCIES = ('flax', 'jax', 'jaxlib', 'numpy')


def numbers() -> dict[str, float]:
  """Values and gradients: of a connection, and of the projection."""
  x = jax.random.normal(jax.random.key(0), (2, 8, 4, 128), jnp.float32)
  found = {
    f'{name} {implementation}': _norm(jax.grad(loss)(argument, implementation))
    for name, loss, argument in (
      ('connection', _connection_loss, x),
      ('projection', _projection_loss, x[..., :4]),
    )
    for implementation in ('xla', 'pallas')
  }
  found['shard_map'] = _norm(_on_two_devices(x))
  return found


def _connection_loss(x, implementation):
  first, second = (
    mhc.MHC(128, num_streams=4, index=index, implementation=implementation)
    for index in range(2)
  )
  h, context = first.pre(x)
  h, context = second.advance(jnp.tanh(h), context)
  return jnp.sum(jnp.sin(second.post(jnp.tanh(h), context)))


def _projection_loss(logits, implementation):
  projected = mhc.sinkhorn_project(logits, implementation=implementation)
  return jnp.sum(jnp.sin(3 * projected))


def _on_two_devices(x):
  """The gradient through parameters that both devices share."""
  mesh = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])
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
