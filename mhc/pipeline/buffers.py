"""Buffers of a pipeline's stages, and transfers between them, by a table."""

import jax
import jax.numpy as jnp

from mhc.parallel import mesh as mesh_lib
from mhc.pipeline import transfers

PIPE = mesh_lib.PIPE


def rows(schedule):
  """The table, to scan over."""
  return {name: jnp.asarray(column) for name, column in schedule.table.items()}


def mine(row):
  """Of a row of the table, this device's part; what is for all stays."""
  device = jax.lax.axis_index(PIPE)
  return {
    name: take(column, device) if column.ndim else column
    for name, column in row.items()
  }


def from_last(tree, schedule):
  """What the last stage's device has, on every device."""
  here = is_last(schedule)
  return mesh_lib.varying(
    jax.tree.map(
      lambda leaf: jax.lax.psum(jnp.where(here, leaf, 0), PIPE), tree
    )
  )


def is_last(schedule):
  """Whether this device has the last stage."""
  last = 0 if schedule.placement == 'vshape' else schedule.num_devices - 1
  return jax.lax.axis_index(PIPE) == last


def send(tree, kind, schedule):
  """The transfers of one kind: shift -> what arrives by it."""
  size = schedule.num_devices
  return {
    shift: jax.tree.map(
      lambda leaf, shift=shift: jax.lax.ppermute(
        leaf, PIPE, [(d, (d + shift) % size) for d in range(size)]
      ),
      tree,
    )
    for channel, shift in schedule.channels
    if channel == kind
  }


def store(buffer, kind, my, own, arrived, schedule):
  """Puts what arrived, or stays on this device, where the table says."""
  for shift, name in transfers.SIDES.items():
    column = f'{kind}_{name}'
    if (schedule.table[column] >= 0).any():
      buffer = put(buffer, my[column], arrived[shift] if shift else own)
  return buffer


def put(buffer, slot, value):
  """buffer[slot] = value, nothing for slot -1."""

  def leaf(buffer, value):
    place = jnp.maximum(slot, 0)
    old = take(buffer, place)
    new = jnp.where(slot >= 0, value, old)
    return jax.lax.dynamic_update_index_in_dim(buffer, new, place, 0)

  return jax.tree.map(leaf, buffer, value)


def slot(buffer, slot):
  """buffer[slot], of slot -1 whatever it may be."""
  return jax.tree.map(lambda leaf: take(leaf, jnp.maximum(slot, 0)), buffer)


def take(leaf, index):
  return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)


def full(shapes, value, *extra):
  """Arrays of one value, with the dimensions `extra` in front."""
  return mesh_lib.varying(
    jax.tree.map(
      lambda leaf: jnp.full((*extra, *leaf.shape), value, leaf.dtype), shapes
    )
  )
