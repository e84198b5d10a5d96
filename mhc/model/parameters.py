"""What every parameter is: one row of one table.

    path        in its block, or in the model; a part may hold wildcards
    decays      whether weight decay acts on it. Gains, gates and static biases
                do not decay (DeepSeek-V4, arXiv 2606.19348, Sec. 2.4; V4.1);
                projections phi and theta do, as other matrices
    optimizer   'muon' for matrices, if it is chosen; embedding, head and
                everything that is no matrix keep AdamW (DeepSeek-V4, Sec. 2.4)
    used_in     the dtype of the product: that of the activations, or float32
    split       the axis of the mesh that splits each dimension
    counted     'token': every token meets all of it; 'routed': the experts that
                a token is sent to; 'lookup': a row of it, no FLOPs; 'none': it
                is no parameter, but a constant that is kept with them
    export      the tensor of other code: 'as_is'; 'weight', a vector or table
                under that name; 'transposed', a matrix as PyTorch has it;
                'experts', one such matrix an expert; 'deepseek', the hc_*
                tensors, where DeepSeek has the kind of connection

A test checks that each leaf of every kind of model matches exactly one row. A
new parameter is one more.
"""

import fnmatch
import functools
from typing import Literal, NamedTuple

import jax

from mhc.axes import DATA, EXPERT

BLOCKS = ('dense_blocks', 'moe_blocks')
# What the parameters of connections, and of other residuals, begin with.
ADDED = ('*_connection', 'expand', 'collapse', 'attention/value_residual')
ROOTS = (*BLOCKS, 'embed', 'expand', 'collapse', 'norm', 'head')


class Row(NamedTuple):
  """See the top of the file."""

  path: str
  decays: bool
  optimizer: Literal['muon', 'adamw']
  used_in: Literal['activation', 'float32']
  split: tuple[str | None, ...]
  counted: Literal['token', 'routed', 'lookup', 'none']
  export: Literal['as_is', 'weight', 'transposed', 'experts', 'deepseek']

  @property
  def part(self) -> Literal['base', 'connection', 'adapter']:
    """What it belongs to: the plain network, or what is added to it."""
    if 'adapter' in self.path:
      return 'adapter'
    of_streams = self.path.startswith(ADDED)
    return 'connection' if of_streams else 'base'


def _matrix(path, used_in='activation', optimizer='muon'):
  return Row(path, True, optimizer, used_in, (DATA,), 'token', 'transposed')


def _small(
  path, *, decays=False, optimizer='adamw', export='as_is', counted='token'
):
  return Row(path, decays, optimizer, 'float32', (None,), counted, export)


def _connection(path):
  """phi, alpha and bias of an mHC connection, or of a learned collapse."""
  phi = Row(
    f'{path}/phi', True, 'muon', 'float32', (DATA,), 'token', 'deepseek'
  )
  small = (_small(f'{path}/{n}', export='deepseek') for n in ('alpha', 'bias'))
  return phi, *small


PARAMETERS = (
  Row(
    'embed/table',
    decays=True,
    optimizer='adamw',
    used_in='activation',
    split=(None, DATA),
    counted='lookup',
    export='weight',
  ),
  _matrix('head/weight', optimizer='adamw'),
  _small('norm/gain', export='weight'),
  _small('*_norm/gain', export='weight'),
  _small('attention/*norm/gain', export='weight'),
  _small('attention/value_residual/gain'),
  _matrix('attention/*/weight'),
  _small('attention/*/bias'),
  _matrix('attention/*/adapter_*'),
  _matrix('ffn/*/adapter_*'),
  _matrix('ffn/shared/*/adapter_*'),
  _matrix('ffn/[gud]*/weight'),
  _matrix('ffn/shared/*/weight'),
  _matrix('ffn/router/weight', used_in='float32'),
  Row(
    'ffn/*',
    decays=True,
    optimizer='muon',
    used_in='activation',
    split=(EXPERT, DATA),
    counted='routed',
    export='experts',
  ),
  *_connection('*_connection'),
  *_connection('*_connection/next_mhc'),
  *_connection('collapse'),
  _small('expand/scale'),
  # The wide residual.
  _matrix('*_connection/down'),
  _matrix('*_connection/up'),
  # Depth routing; a place is no parameter.
  _small('*_connection/query'),
  _small('*_connection/weights'),
  _small('*_connection/scales'),
  _small('collapse/query'),
  _small('collapse/weights'),
  _small('*_connection/place', counted='none'),
  # Hyper-Connections.
  _small('*_connection/gain'),
  _small('*_connection/bias_*'),
  _small('*_connection/theta_pre', decays=True),
  _small('*_connection/theta_post', decays=True),
  _small('*_connection/theta_res', decays=True, optimizer='muon'),
)


# Of a class from outside (`connections.own`), unless a row above matches.
OWN = _small('*_connection/*')


def path_names(path) -> tuple[str, ...]:
  """The names on a path into a tree, whatever kind of nodes they are."""
  return tuple(
    jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  )


@functools.cache
def locate(names: tuple[str, ...]) -> tuple[str | None, Row] | None:
  """The stack of blocks (None outside of them) and the row of a parameter.

  Args:
    names: of its path from the root of the parameters, or from further above,
      as in the state of an optimiser.

  Returns:
    None for what is no parameter, such as an optimiser's count.

  Raises:
    ValueError: a parameter without a row, or with several.
  """
  roots = [number for number, name in enumerate(names) if name in ROOTS]
  if not roots:
    return None
  first = roots[0]
  stack = names[first] if names[first] in BLOCKS else None
  own = names[first + (stack is not None) :]
  found = [row for row in PARAMETERS if _matches(row.path, own)]
  if not found and _matches(OWN.path, own):
    found = [OWN]
  if len(found) != 1:
    raise ValueError(
      f'the parameter {"/".join(own)} matches {len(found)} rows of '
      'mhc/model/parameters.py: give it exactly one'
    )
  return stack, found[0]


def row(path) -> Row:
  """The row of the parameter at a path of JAX's into the parameters.

  Raises:
    ValueError: it has none.
  """
  found = locate(path_names(path))
  if found is None:
    raise ValueError(f'{path_names(path)} is no parameter of the model')
  return found[1]


def _matches(pattern, names):
  parts = pattern.split('/')
  return len(parts) == len(names) and all(
    map(fnmatch.fnmatchcase, names, parts)
  )
