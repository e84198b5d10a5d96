r"""Converts connections to and from the tensors of DeepSeek-V4 and Hy4.

For n streams of width d, DeepSeek-V4 has three float32 tensors a
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
except for the eps that DeepSeek adds to pre. A learned `Collapse` is its head,
without comb: fn = phi^T [n, n d], base [n], scale [1]. Single-pass mHC
(DeepSeek-V4.1) has the same tensors and no head.

Tencent's Hy4 has identity connections: the same without comb, fn [2 n, n d],
base [2 n], scale [2], post + eps as well, y_i = x_i + post_i F(h). Its eps,
1e-6, is in no formula of ours.

Names. Block l has hc_attn_* and hc_ffn_*:

    layers.3.hc_attn_fn         hc_head_fn              DeepSeek
    model.layers.3.attn_hc.fn   model.hc_head.hc_fn     transformers
    model.layers.3.hc_attn_layer.hc_pre.hc_fn           Tencent, with hc_mlp_
    model.hc_head.hc_head_fn                            and its head

The former are of the code released with DeepSeek-V4, inference/model.py
(`Block`, `Transformer`), with the formulas in its kernel.py
(`hc_split_sinkhorn`); the latter of transformers, models/deepseek_v4, which its
glm5_next reuses with a mean for the head, and hy_v4 without comb. Files also
mix them, as in model.layers.3.hc_attn_fn; all of these are accepted.
"""

from collections.abc import Mapping
import re
from typing import Any, Literal

import jax
import numpy as np

from mhc import config as config_lib
from mhc.interop import names as names_lib
from mhc.parallel.placement import Params

NAMES = re.compile(
  r'(model\.(language_model\.)?)?'
  r'((?P<block>layers\.\d+\.)(hc_(?P<a>attn|ffn)_|(?P<b>attn|ffn)_hc\.'
  r'|hc_(?P<c>attn|mlp)_layer\.(hc_pre\.)?hc_)'
  r'|hc_head(_|\.hc_(head_)?))(?P<role>fn|base|scale)'
)


def connection_to_deepseek(
  params: Mapping[str, Any], num_streams: int
) -> dict[str, np.ndarray]:
  """Converts phi, alpha, bias of an `MHC` or `Collapse` to fn, base, scale.

  Raises:
    ValueError: H_res is neither by Sinkhorn nor I, or of another number of
      streams.
  """
  width, scales = np.shape(params['phi'])[0], np.shape(params['alpha'])
  parts = _triple(num_streams, width, scales)
  return names_lib.written(parts, params)


def connection_from_deepseek(
  tensors: Mapping[str, np.ndarray | jax.Array], num_streams: int
) -> dict[str, np.ndarray]:
  """Converts fn, base, scale to phi, alpha, bias.

  scale is [3], [2] where H_res is I, [1] for a `Collapse`.

  Raises:
    ValueError: one is missing or unknown, of another shape, or neither float32
      nor of 16 bits.
  """
  fn, scales = (np.shape(tensors.get(name, ())) for name in ('fn', 'scale'))
  parts = _triple(num_streams, fn[-1] if fn else 0, scales)
  names_lib.check(tensors, parts, halves=True)
  params = {}
  for part in parts:
    shape = part.shape[::-1] if part.transposed else part.shape
    params[part.path[0]] = np.empty(shape, np.float32)
    part.read(tensors[part.name], params[part.path[0]])
  return params


def to_deepseek(
  params: Params,
  config: config_lib.ModelConfig,
  names: Literal['deepseek', 'transformers', 'tencent'] = 'deepseek',
) -> dict[str, np.ndarray]:
  """Converts a model's connections, and its head's if that is learned.

  Raises:
    ValueError: nobody has tensors for the model's kind of connection, or for
      its expansion; or Tencent has not.
  """
  tensors = names_lib.written(_connections(config), params)
  kind = config.connection.kind
  if names == 'tencent' and kind != 'identity':
    raise ValueError(
      f"names='tencent' are of connection.kind='identity', not {kind!r}"
    )
  return {_renamed(name, names): tensor for name, tensor in tensors.items()}


def _renamed(name, names):
  if names == 'deepseek':
    return name
  if names == 'transformers':
    block, head = r'\1_hc.', 'head.hc_'
  else:
    name = name.replace('hc_ffn_', 'hc_mlp_')
    block, head = r'hc_\1_layer.hc_pre.hc_', 'head.hc_head_'
  name = re.sub('hc_(attn|ffn|mlp)_', block, name)
  return 'model.' + name.replace('head_', head)


def from_deepseek(
  tensors: Mapping[str, np.ndarray | jax.Array],
  params: Params,
  config: config_lib.ModelConfig,
) -> Params:
  """Returns a model's parameters with the connections of `tensors`.

  Args:
    tensors: all of the model's connections, under any of the names above, and
      nothing else; arrays of NumPy or JAX, float32 or of 16 bits.
    params: not modified; leaves other than the connections' are shared.
    config: of the model.

  Raises:
    ValueError: a tensor is missing or unknown, of another shape, neither
      float32 nor of 16 bits, nobody has tensors for the model's kind of
      connection or expansion, or a mapping of it is not dynamic.
  """
  parts, found, connection = _connections(config), {}, config.connection
  for name in ('pre', 'post', 'res'):
    if getattr(connection, name) != 'dynamic':
      raise ValueError(
        f'connection.{name}={getattr(connection, name)!r} would ignore tensors '
        f"of DeepSeek's, which are of dynamic mappings: set {name}='dynamic'"
      )
  for name, tensor in tensors.items():
    known = NAMES.fullmatch(name)
    if known:
      site = known['a'] or known['b'] or known['c'] or 'head'
      site = 'ffn' if site == 'mlp' else site
      name = f'{known["block"] or ""}hc_{site}_{known["role"]}'
    if name in found:
      raise ValueError(f'{name} is given twice, under two names: remove one')
    found[name] = tensor
  names_lib.check(found, parts, names_lib.describe(config), halves=True)
  abstract, params = (
    names_lib.abstract(config),
    jax.tree.map(lambda leaf: leaf, params),
  )
  for path in {part.path for part in parts}:
    *above, last = path
    names_lib.at(params, above)[last] = np.empty(
      names_lib.at(abstract, path).shape, np.float32
    )
  for part in parts:
    part.read(found[part.name], names_lib.at(params, part.path))
  return params


def _triple(num_streams, width, scales):
  return names_lib.triple(
    num_streams, width, head=scales == (1,), mixes=scales != (2,)
  )


def _connections(config):
  kind = config.connection.kind
  if kind not in names_lib.KINDS:
    raise ValueError(
      f'connection.kind={kind!r} must be one of {names_lib.KINDS}: DeepSeek '
      'and Tencent have no tensors for others'
    )
  if not names_lib.is_deepseek(config.connection):
    raise ValueError(
      f'connection.res={config.connection.res!r} leaves no logits of H_res, '
      "which DeepSeek's tensors have: only 'dynamic' and 'static' do"
    )
  return [
    part for part in names_lib.tensors(config) if NAMES.fullmatch(part.name)
  ]
