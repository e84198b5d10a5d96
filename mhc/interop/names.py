"""The tensors of other code, and the part of our parameters that each holds.

`parameters` defines how a parameter is exported; here it becomes one tensor per
block and expert, with name, shape and transposition. docs/interop.md lists
them.
"""

from collections.abc import Iterable
import functools
import operator
from typing import NamedTuple

import jax
from jaxtyping import Array
import numpy as np

from mhc import config as config_lib
from mhc.model import parameters
from mhc.model import transformer

# For which DeepSeek has tensors, or Tencent.
KINDS = ('mhc', 'mhc_single_pass', 'identity')
SITES = dict(attention_connection='attn', ffn_connection='ffn', collapse='head')


class Tensor(NamedTuple):
  """A tensor of other code, and the part of a leaf of our tree it holds."""

  name: str
  path: tuple[str, ...]  # of the leaf
  index: tuple[int, ...]  # of the part in it: block, expert
  shape: tuple[int, ...]  # of the tensor
  transposed: bool = False  # the part is a matrix, the tensor its transpose
  streams: int = 0  # n, where rows are [pre | post | comb]
  rows: tuple[int, ...] = ()  # which of the part's rows each row is; () for all

  def write(self, leaf: Array | np.ndarray) -> np.ndarray:
    part = np.asarray(leaf)[self.index]
    tensor = part.T if self.transposed else part
    check({self.name: tensor}, [self])
    # safetensors writes memory as it lies and ignores the strides.
    return np.ascontiguousarray(tensor[self._order()])

  def read(self, tensor: np.ndarray | jax.Array, leaf: np.ndarray):
    part = np.empty(tensor.shape, np.float32)
    part[self._order()] = tensor
    leaf[self.index] = part.T if self.transposed else part

  def _order(self):
    return list(self.rows) or _comb_order(self.streams)


def abstract(config: config_lib.ModelConfig) -> dict:
  """Abstract parameters and, as one of them, the router's bias."""
  _, tree = transformer.abstract(config)
  bias = transformer.abstract_router_bias(config)
  return tree if bias is None else tree | {'router_bias': bias}


def check_model(config: config_lib.ModelConfig):
  """Checks that its tensors say all that a model computes.

  Mappings that are static or off do: phi is 0, bias the constant.

  Raises:
    ValueError: they do not.
  """
  if config.connection.expand_scale != 'ones':
    raise ValueError(
      f'connection.expand_scale={config.connection.expand_scale!r} cannot be '
      'exported: no tensor holds the scales of the streams; only models of '
      "expand_scale='ones' can"
    )
  if config.connection.sinkhorn_method != 'sinkhorn':
    raise ValueError(
      "connection.sinkhorn_method='newton' cannot be exported: who reads the "
      "tensors would iterate; only models of sinkhorn_method='sinkhorn' can"
    )


def is_deepseek(connection: config_lib.ConnectionConfig) -> bool:
  """Whether DeepSeek has tensors for the connection, or Tencent without res."""
  whole = connection.mixes_streams or connection.kind == 'identity'
  return connection.kind in KINDS and whole


@functools.lru_cache(maxsize=8)
def tensors(config: config_lib.ModelConfig) -> list[Tensor]:
  """All tensors of a model, the blocks' in order of depth."""
  check_model(config)
  num_dense = config.num_blocks - config.num_moe_blocks
  first = {'dense_blocks': 0, 'moe_blocks': num_dense, 'router_bias': num_dense}
  numbered = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(config)):
    path = parameters.path_names(path)
    if path[0] not in first:
      numbered += [(-1, p) for p in _named(path, path, leaf.shape, config)]
      continue
    for row in range(leaf.shape[0]):
      names, block = path[1:] or ('ffn', 'router', 'bias'), first[path[0]] + row
      for part in _named(names, path, leaf.shape[1:], config):
        name, index = f'layers.{block}.{part.name}', (row, *part.index)
        numbered.append((block, part._replace(name=name, index=index)))
  return [part for _, part in sorted(numbered, key=operator.itemgetter(0))]


def _named(names, path, shape, config):
  """The tensors of a leaf, or of one block's part of it."""
  name, n = '.'.join(names), config.connection.streams
  if path[0] == 'router_bias':
    return [Tensor(name, path, (), shape)]
  _, row = parameters.locate(path)
  match row.export:
    case 'deepseek' if names[0] == 'collapse' or is_deepseek(config.connection):
      site, role = names[0], names[-1]
      found = triple(
        n, n * config.dim, site == 'collapse', config.connection.mixes_streams
      )
      by_role = {t.path[0]: t for t in found}
      name = f'hc_{SITES[site]}_{by_role[role].name}'
      return [by_role[role]._replace(name=name, path=path)]
    case 'experts':
      name = name.replace('ffn', 'ffn.experts.{}') + '.weight'
      return [
        Tensor(name.format(expert), path, (expert,), shape[:0:-1], True)
        for expert in range(shape[0])
      ]
    case 'transposed':
      return [Tensor(name, path, (), shape[::-1], transposed=True)]
    case 'weight':
      return [Tensor('.'.join([*names[:-1], 'weight']), path, (), shape)]
  return [Tensor(name, path, (), shape)]


def triple(num_streams, width, head=False, mixes=True):
  """fn, base, scale of streams with `width` numbers in total.

  Of a connection that mixes them, or not, or of the head.
  """
  n, streams = num_streams, num_streams if mixes and not head else 0
  k, scales = (n, 1) if head else (2 * n + n * n, 3) if mixes else (2 * n, 2)
  return [
    Tensor('fn', ('phi',), (), (k, width), True, streams),
    Tensor('base', ('bias',), (), (k,), False, streams),
    Tensor('scale', ('alpha',), (), (scales,)),
  ]


def _comb_order(num_streams):
  """Permutation from [pre | post | res] to [pre | post | comb], and back."""
  if not num_streams:
    return slice(None)
  n = num_streams
  comb = np.arange(n * n).reshape(n, n).T.reshape(-1)
  return np.concatenate([np.arange(2 * n), 2 * n + comb])


def written(parts: Iterable[Tensor], tree) -> dict[str, np.ndarray]:
  """Converts our parameters to tensors by name."""
  return {part.name: part.write(at(tree, part.path)) for part in parts}


# Types that become float32, by the names of files and of arrays.
HALVES = ('BF16', 'F16', 'bfloat16', 'float16')


def check(found, parts, model='', *, halves=False):
  """Checks that `found`, arrays or slices of a file, are exactly `parts`.

  `halves` says whether numbers of 16 bits are taken.

  Raises:
    ValueError: one is missing, unknown, of another shape or type.
  """
  wanted = {part.name: f'float32 {list(part.shape)}' for part in parts}
  for name, tensor in found.items():
    kind = _kind(tensor, halves)
    if name not in wanted:
      raise ValueError(f'{name}, {kind}, is an unknown tensor{model}')
    if kind != wanted[name]:
      raise ValueError(f'{name} is {kind}, must be {wanted[name]}{model}')
  for name, kind in wanted.items():
    if name not in found:
      raise ValueError(f'{name}, {kind}, is missing{model}')


def _kind(tensor, halves):
  if isinstance(tensor, np.ndarray | jax.Array):
    dtype, shape = tensor.dtype.name, tensor.shape
  else:
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
  if dtype == 'F32' or (halves and dtype in HALVES):
    dtype = 'float32'
  return f'{dtype} {list(shape)}'


def describe(config: config_lib.ModelConfig) -> str:
  """Describes a model, for messages about tensors that do not fit it."""
  c, width = config.connection, config.dim
  return (
    f': the model has {config.num_blocks} blocks, {c.streams} streams of width '
    f'{width}, connection.kind={c.kind!r}, connection.collapse={c.collapse!r}'
  )


def at(tree, path):
  """The leaf at a path of names."""
  return functools.reduce(operator.getitem, path, tree)
