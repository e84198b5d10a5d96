"""Buffers of a pipeline's stages, and transfers between them, by a table."""

import jax
import jax.numpy as jnp

from mhc import axes
from mhc.axes import PIPE
from mhc.pipeline import transfers


def table_rows(schedule):
  """The table, to scan over."""
  return {name: jnp.asarray(column) for name, column in schedule.table.items()}


def device_row(row):
  """A row of the table as this device sees it: its own entry of each column."""
  device = jax.lax.axis_index(PIPE)
  return {
    name: index(column, device) if column.ndim else column
    for name, column in row.items()
  }


def broadcast_from_last(tree, schedule):
  """The tree of the last stage's device, on every device."""
  here = is_last(schedule)
  return axes.cast_varying_everywhere(
    jax.tree.map(
      lambda leaf: jax.lax.psum(jnp.where(here, leaf, 0), PIPE), tree
    )
  )


def is_last(schedule):
  """Whether this device has the last stage."""
  last = 0 if schedule.placement == 'vshape' else schedule.num_devices - 1
  return jax.lax.axis_index(PIPE) == last


def permute(tree, kind, schedule):
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


def store_received(buffer, kind, my, own, arrived, schedule):
  """Puts what arrived, or stays on this device, where the table says."""
  for shift, name in transfers.SIDES.items():
    column = f'recv_{kind}_{name}'
    if (schedule.table[column] >= 0).any():
      buffer = write_slot(buffer, my[column], arrived[shift] if shift else own)
  return buffer


def write_slot(buffer, slot, value):
  """buffer[slot] = value, nothing for slot -1."""

  def leaf(buffer, value):
    place = jnp.maximum(slot, 0)
    old = index(buffer, place)
    new = jnp.where(slot >= 0, value, old)
    return jax.lax.dynamic_update_index_in_dim(buffer, new, place, 0)

  return jax.tree.map(leaf, buffer, value)


def read_slot(buffer, slot):
  """buffer[slot]; for slot -1 anything."""
  return jax.tree.map(lambda leaf: index(leaf, jnp.maximum(slot, 0)), buffer)


def index(leaf, number):
  return jax.lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False)


def read_at(buffer, at, size=None):
  """buffer[at]; with a size, that many from the last of `at` on."""
  block = _block(buffer, at, size)
  shape = buffer.shape[len(at) :]
  found = jax.lax.dynamic_slice(buffer, _start(buffer, at), block)
  return found.reshape(shape if size is None else (size, *shape))


def write_at(buffer, at, value, size=None):
  """buffer[at] = value, as `read_at` reads it."""
  value = value.reshape(_block(buffer, at, size))
  return jax.lax.dynamic_update_slice(buffer, value, _start(buffer, at))


def _start(buffer, at):
  zeros = (0,) * (buffer.ndim - len(at))
  return [jnp.asarray(place, jnp.int32) for place in (*at, *zeros)]


def _block(buffer, at, size):
  ones = (1,) * (len(at) - 1)
  return (*ones, size or 1, *buffer.shape[len(at) :])


def unused(shapes, *extra):
  """Arrays that are written before they are read, or never read.

  Their values must not matter: tests put NaN here.
  """
  return filled(shapes, 0, *extra)


def filled(shapes, value, *extra):
  """Arrays of one value, with the dimensions `extra` in front."""
  return axes.cast_varying_everywhere(
    jax.tree.map(
      lambda leaf: jnp.full((*extra, *leaf.shape), value, leaf.dtype), shapes
    )
  )
