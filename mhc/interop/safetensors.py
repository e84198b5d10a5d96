r"""A model's parameters under the names and in the shapes of other code.

Connections. For n streams of width d, DeepSeek-V4 has three float32 tensors a
connection, with k = 2 n + n^2 numbers in the order [pre | post | comb]:

    fn [k, n d],  base [k],  scale [3]

    m = fn x / r * scale + base                r the root mean square of x
    pre = sigmoid(m_pre) + eps,  post = 2 sigmoid(m_post)
    comb = softmax of the rows of m_comb, + eps; columns normalised, then
           (iterations - 1) times rows and columns
    h = sum_j pre_j x_j,   y_i = post_i F(h) + sum_j comb_ji x_j

y contracts the *first* index of comb: comb is the transpose of H_res, and what
normalises its rows normalises the columns of Eq. 9. With T the transposition of
the last n^2 entries as an n x n matrix,

    fn = T phi^T,   base = T bias,   scale = alpha,

exactly, both ways. With `sinkhorn_eps=1e-6` the layers are the same function
but for the eps that DeepSeek adds to pre. A learned `Collapse` is its head,
without comb: fn = phi^T [n, n d], base [n], scale [1]. Single-pass mHC
(DeepSeek-V4.1) has the same tensors and no head.

Names. Block l has hc_attn_* and hc_ffn_*:

    layers.3.hc_attn_fn         hc_head_fn              DeepSeek
    model.layers.3.attn_hc.fn   model.hc_head.hc_fn     transformers

The former are of the code released with DeepSeek-V4, inference/model.py
(`Block`, `Transformer`), with the formulas in its kernel.py
(`hc_split_sinkhorn`); the latter of transformers, models/deepseek_v4, which its
glm5_next takes over with a mean for the head. Files also mix them, as in
model.layers.3.hc_attn_fn; all of these are read.

Files. `export` writes all parameters as safetensors, one tensor a block and
expert; docs/interop.md has the names. `load` reads them back.
"""

from collections.abc import Iterable, Mapping
import contextlib
import functools
import json
import math
import operator
import pathlib
import re
import shutil
from typing import Any, Literal, NamedTuple

from flax import nnx
import jax
from jaxtyping import Array, Float
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from mhc import config as config_lib
from mhc.config import dicts
from mhc.model import transformer
from mhc.parallel import mesh as mesh_lib
from mhc.runtime import files as files_lib
from mhc.training import checkpoint
from mhc.training import step
from mhc.training import workdir as workdir_lib

INDEX = 'model.safetensors.index.json'
KINDS = ('mhc', 'mhc_single_pass')  # of which DeepSeek has tensors
NAMES = re.compile(
  r'(model\.(language_model\.)?)?'
  r'((?P<block>layers\.\d+\.)(hc_(?P<a>attn|ffn)_|(?P<b>attn|ffn)_hc\.)'
  r'|hc_head(_|\.hc_))(?P<role>fn|base|scale)'
)
SITES = dict(attention_connection='attn', ffn_connection='ffn', collapse='head')


class Part(NamedTuple):
  """A tensor of other code, and the part of a leaf of our tree that it is."""

  name: str
  path: tuple[str, ...]  # of the leaf
  index: tuple[int, ...]  # of the part in it: block, expert
  shape: tuple[int, ...]  # of the tensor
  transposed: bool = False  # the part is a matrix, the tensor its transpose
  streams: int = 0  # n, where rows are [pre | post | comb]

  def write(self, leaf: Array | np.ndarray) -> np.ndarray:
    part = np.asarray(leaf)[self.index]
    tensor = part.T if self.transposed else part
    _check({self.name: tensor}, [self])
    # safetensors takes memory as it lies, whatever the strides say.
    return np.ascontiguousarray(tensor[_order(self.streams)])

  def read(self, tensor: np.ndarray, leaf: np.ndarray):
    tensor = tensor[_order(self.streams)]
    leaf[self.index] = tensor.T if self.transposed else tensor


def connection_to_deepseek(
  params: Mapping[str, Any], num_streams: int
) -> dict[str, np.ndarray]:
  """phi, alpha, bias of an `MHC` or a `Collapse` -> fn, base, scale.

  Raises:
    ValueError: H_res is not by Sinkhorn, or it is of other streams.
  """
  width, head = np.shape(params['phi'])[0], np.shape(params['alpha']) == (1,)
  return _written(_triple(num_streams, width, head), params)


def connection_from_deepseek(
  tensors: Mapping[str, np.ndarray], num_streams: int
) -> dict[str, np.ndarray]:
  """fn, base, scale -> phi, alpha, bias of an `MHC` or, scale [1], `Collapse`.

  Raises:
    ValueError: one is missing or unknown, of another shape or not float32.
  """
  fn, scale = (np.shape(tensors.get(name, ())) for name in ('fn', 'scale'))
  parts = _triple(num_streams, fn[-1] if fn else 0, head=scale == (1,))
  _check(tensors, parts)
  params = {}
  for part in parts:
    shape = part.shape[::-1] if part.transposed else part.shape
    params[part.path[0]] = np.empty(shape, np.float32)
    part.read(tensors[part.name], params[part.path[0]])
  return params


def to_deepseek(
  params: step.Params,
  config: config_lib.ModelConfig,
  names: Literal['deepseek', 'transformers'] = 'deepseek',
) -> dict[str, np.ndarray]:
  """The connections of a model, and its head's if that is learned.

  Raises:
    ValueError: the model's kind of connection has no tensors there.
  """
  tensors = _written(_connections(config), params)
  if names == 'deepseek':
    return tensors
  return {
    'model.'
    + re.sub('hc_(attn|ffn)_', r'\1_hc.', name).replace('head_', 'head.hc_'): t
    for name, t in tensors.items()
  }


def from_deepseek(
  tensors: Mapping[str, np.ndarray],
  params: step.Params,
  config: config_lib.ModelConfig,
) -> step.Params:
  """A model's parameters with the connections that `tensors` hold.

  Args:
    tensors: all of the model's connections, under any of the names above, and
      nothing else; float32.
    params: stays as it is; leaves other than the connections' are shared.
    config: of the model.

  Raises:
    ValueError: a tensor is missing or unknown, of another shape or not float32,
      or the model's kind of connection has no tensors there.
  """
  parts, found = _connections(config), {}
  for name, tensor in tensors.items():
    known = NAMES.fullmatch(name)
    if known:
      site = known['a'] or known['b'] or 'head'
      name = f'{known["block"] or ""}hc_{site}_{known["role"]}'
    if name in found:
      raise ValueError(f'{name} is there twice, under two names')
    found[name] = tensor
  _check(found, parts, _describe(config))
  abstract, params = _abstract(config), jax.tree.map(lambda leaf: leaf, params)
  for path in {part.path for part in parts}:
    *above, last = path
    _at(params, above)[last] = np.empty(_at(abstract, path).shape, np.float32)
  for part in parts:
    part.read(found[part.name], _at(params, part.path))
  return params


def export(
  workdir: pathlib.Path, out: pathlib.Path, max_bytes: int = 5 * 10**9
) -> int:
  """Writes a run's newest state, without its optimiser's, for other code.

  Beside the state this takes the memory of one file. The folder `out`, which
  must not exist or be empty, appears when it is complete.

  Args:
    workdir: the run's folder.
    out: as for `load`.
    max_bytes: of a file; more go to several. A tensor is never split.

  Returns:
    the number of updates that the state has had.

  Raises:
    ValueError: no run, no checkpoint, or `out` is in use.
  """
  config, out = workdir_lib.read_config(workdir), out.absolute()
  if out.exists() and not (out.is_dir() and not any(out.iterdir())):
    raise ValueError(f'{out} is in use: choose another --out')
  state = _restore(workdir, config)
  partial = out.with_name(out.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for name in ('config.json', 'tokenizer.json'):
    if (workdir / name).exists():
      shutil.copyfile(workdir / name, partial / name)
  _write(partial, state, config.model, max_bytes)
  partial.replace(out)
  return int(state.step)


def load(
  folder: pathlib.Path,
) -> tuple[config_lib.Config, step.Params, Float[np.ndarray, 'l e'] | None]:
  """What `export` wrote, bit for bit: settings, parameters, router's bias.

  Raises:
    ValueError: the folder holds something else, or not all of it.
  """
  config = workdir_lib.read_config(folder)
  files = [folder / 'model.safetensors']
  if (folder / INDEX).exists():
    weight_map = json.loads((folder / INDEX).read_text()).get('weight_map', {})
    files = [folder / name for name in sorted(set(weight_map.values()))]
  with contextlib.ExitStack() as stack:
    where = {}
    for file in files:
      opened = stack.enter_context(_open(file))
      where |= dict.fromkeys(opened.keys(), opened)
    parts = _parts(config.model)
    slices = {name: file.get_slice(name) for name, file in where.items()}
    _check(slices, parts, _describe(config.model))
    tree = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype), _abstract(config.model)
    )
    for part in parts:
      part.read(where[part.name].get_tensor(part.name), _at(tree, part.path))
  return config, tree, tree.pop('router_bias', None)


def _open(file):
  try:
    return safetensors.safe_open(file, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file} is not a safetensors file: {error}') from None


def _write(folder, state, config, max_bytes):
  tree = state.params | {'router_bias': state.router_bias}
  files, size = [[]], 0
  for part in _parts(config):
    num_bytes = 4 * math.prod(part.shape)
    if files[-1] and size + num_bytes > max_bytes:
      files.append([])
      size = 0
    files[-1].append(part)
    size += num_bytes
  weight_map = {}
  for number, parts in enumerate(files, 1):
    name = f'model-{number:05}-of-{len(files):05}.safetensors'
    if len(files) == 1:
      name = 'model.safetensors'
    # 'pt': matrices are [out, in], as in PyTorch.
    metadata = {'format': 'pt', 'step': str(int(state.step))}
    safetensors_numpy.save_file(_written(parts, tree), folder / name, metadata)
    shutil.copymode(folder / 'config.json', folder / name)  # others may read it
    weight_map |= dict.fromkeys((part.name for part in parts), name)
  if len(files) > 1:
    total = sum(4 * math.prod(part.shape) for part in _parts(config))
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    files_lib.replace(folder / INDEX, json.dumps(index, indent=2) + '\n')


def _restore(workdir, config):
  """The newest state but for the optimiser's, in the host's memory."""
  # None of these changes what a state is, and the host can do with them.
  config = dicts.replace(
    config,
    mesh=config_lib.MeshConfig(num_devices=1),
    data={'microbatch_size': 0},
    model={
      'connection': {'implementation': 'auto'},
      'moe': {'transport': 'auto'},
    },
  )
  host = jax.local_devices(backend='cpu')[:1]
  mesh = mesh_lib.make_mesh(config.mesh, config.data, host)
  abstract = step.functions(config, mesh).canonical_state
  return checkpoint.restore(workdir, abstract)._replace(opt_state=None)


def _abstract(config):
  """Shapes of the parameters and, as one of them, of the router's bias."""
  model = nnx.eval_shape(
    lambda: transformer.Transformer(config, rngs=nnx.Rngs(0))
  )
  tree = nnx.to_pure_dict(nnx.state(model))
  if config.num_moe_blocks:
    shape = (config.num_moe_blocks, config.moe.num_experts)
    tree['router_bias'] = jax.ShapeDtypeStruct(shape, np.float32)
  return tree


@functools.lru_cache(maxsize=8)
def _parts(config: config_lib.ModelConfig) -> list[Part]:
  """All tensors of a model, the blocks' in order of depth."""
  num_dense = config.num_blocks - config.num_moe_blocks
  first = {'dense_blocks': 0, 'moe_blocks': num_dense, 'router_bias': num_dense}
  numbered = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(_abstract(config)):
    path = mesh_lib.names(path)
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
  match names:
    case (site, *_, role) if site in SITES:
      head = site == 'collapse'
      if not head and config.connection.kind not in KINDS:
        return [Part(name, path, (), shape)]
      parts = {p.path[0]: p for p in _triple(n, n * config.dim, head)}
      name = f'hc_{SITES[site]}_{parts[role].name}'
      return [parts[role]._replace(name=name, path=path)]
    case ('ffn', 'gate' | 'up' | 'down') if len(shape) == 3:
      name = name.replace('ffn', 'ffn.experts.{}') + '.weight'
      return [
        Part(name.format(expert), path, (expert,), shape[:0:-1], True)
        for expert in range(shape[0])
      ]
    case (*_, 'weight'):
      return [Part(name, path, (), shape[::-1], transposed=True)]
    case (*above, 'gain' | 'table'):
      return [Part('.'.join([*above, 'weight']), path, (), shape)]
  return [Part(name, path, (), shape)]


def _triple(num_streams, width, head=False):
  """fn, base, scale of streams that are `width` numbers together."""
  streams = 0 if head else num_streams
  k = num_streams if head else 2 * num_streams + num_streams**2
  return [
    Part('fn', ('phi',), (), (k, width), True, streams),
    Part('base', ('bias',), (), (k,), False, streams),
    Part('scale', ('alpha',), (), (1 if head else 3,)),
  ]


def _connections(config):
  kind = config.connection.kind
  if kind not in KINDS:
    raise ValueError(
      f'connection.kind={kind!r} must be one of {KINDS}: DeepSeek has no '
      'tensors for others'
    )
  return [part for part in _parts(config) if NAMES.fullmatch(part.name)]


def _order(num_streams):
  """From [pre | post | res] to [pre | post | comb], and back."""
  if not num_streams:
    return slice(None)
  n = num_streams
  comb = np.arange(n * n).reshape(n, n).T.reshape(-1)
  return np.concatenate([np.arange(2 * n), 2 * n + comb])


def _written(parts: Iterable[Part], tree) -> dict[str, np.ndarray]:
  return {part.name: part.write(_at(tree, part.path)) for part in parts}


def _check(found, parts, model=''):
  """That exactly these tensors are there; arrays, or of a file."""
  wanted = {part.name: f'float32 {list(part.shape)}' for part in parts}
  for name, tensor in found.items():
    kind = _kind(tensor)
    if name not in wanted:
      raise ValueError(f'{name}, {kind}, has no place here{model}')
    if kind != wanted[name]:
      raise ValueError(f'{name} is {kind}, must be {wanted[name]}{model}')
  for name, kind in wanted.items():
    if name not in found:
      raise ValueError(f'{name}, {kind}, is missing{model}')


def _kind(tensor):
  if isinstance(tensor, np.ndarray):
    return f'{tensor.dtype.name} {list(tensor.shape)}'
  dtype = tensor.get_dtype()  # as F32, BF16
  return f'{dtype.replace("F32", "float32")} {list(tensor.get_shape())}'


def _describe(config):
  c, width = config.connection, config.dim
  return (
    f': the model has {config.num_blocks} blocks, {c.streams} streams of width '
    f'{width}, connection.kind={c.kind!r}, connection.collapse={c.collapse!r}'
  )


def _at(tree, path):
  return functools.reduce(operator.getitem, path, tree)
