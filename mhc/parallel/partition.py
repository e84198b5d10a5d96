"""How arrays lie on the mesh: one `PartitionSpec` a leaf.

`parameters` says what splits a parameter's own dimensions. Of the stacks of
blocks the one that a pipeline is cut from is split over `pipe` as well; every
stage has the other. The state that an optimiser keeps of a parameter lies as
the parameter does.
"""

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mhc.axes import DATA, EXPERT, PIPE
from mhc.model import parameters

P = PartitionSpec
BATCH = P((DATA, EXPERT))
REPLICATED = P()
LAYERS = P(PIPE)  # of the stack of blocks


def spec(
  names: tuple[str, ...], stack: str = 'moe_blocks', head: str = 'last'
) -> PartitionSpec:
  """How a parameter, or its optimiser state, lies.

  Args:
    names: of its path in a tree, from the root.
    stack: the blocks that a pipeline is cut from; all of its devices have the
      others.
    head: 'vocab' splits the logits' matrix over PIPE too.
  """
  if names == ('router_bias',):
    return LAYERS
  found = parameters.locate(names)
  if found is None:
    return P(None)
  blocks, row = found
  if blocks is not None:
    return P(PIPE if blocks == stack else None, *row.split)
  if row.path == 'head/weight' and head == 'vocab':
    return P(*row.split, PIPE)
  return P(*row.split)


def specs(tree, mesh: Mesh, stack: str, head: str):
  """`spec` of every leaf of parameters or of a train state.

  A dimension that does not divide over its axis is not split.
  """

  def leaf(path, value):
    axes = spec(parameters.path_names(path), stack, head)
    return P(
      *(
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, value.shape, strict=False)
      )
    )

  return jax.tree_util.tree_map_with_path(leaf, tree)


def is_layered(path, stack: str) -> bool:
  """Whether the leaf at a path is split over `pipe` by its layers."""
  return spec(parameters.path_names(path), stack)[:1] == (PIPE,)


def abstract(shapes, specs, mesh: Mesh):
  """Shapes with the shardings by which they lie on the mesh."""
  return jax.tree.map(
    lambda leaf, spec: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    ),
    shapes,
    specs,
  )


def rows_here(num_rows: int, mesh: Mesh) -> list[int]:
  """The rows of a batch that the devices of this process need."""
  sharding = NamedSharding(mesh, BATCH)
  indices = sharding.addressable_devices_indices_map((num_rows,)).values()
  return sorted({i for (rows,) in indices for i in range(num_rows)[rows]})


def put_rows(
  rows: np.ndarray, numbers: list[int], num_rows: int, mesh: Mesh
) -> jax.Array:
  """Puts a batch of which every process has those of `rows_here`."""
  if len(numbers) == num_rows:
    return put(rows, mesh, BATCH)
  place = {number: index for index, number in enumerate(numbers)}

  def part(index):
    mine = range(num_rows)[index[0]]
    return rows[place[mine[0]] : place[mine[0]] + len(mine)]

  shape = num_rows, *rows.shape[1:]
  return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), part)


def put(tree, mesh: Mesh, spec: PartitionSpec):
  """Puts arrays, of which every process has the whole, onto the mesh."""
  sharding = NamedSharding(mesh, spec)

  def leaf(value):
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  return jax.tree.map(leaf, tree)
