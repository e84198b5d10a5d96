r"""mHC as functions of plain arrays: for Linen, Equinox or bare JAX.

    params = functional.init(dim, num_streams, index)
    h, context = functional.pre(params, x)      # x [..., n, d] -> h [..., d]
    y = F(norm(h))                              # the sub-layer
    x = functional.post(y, context)             # [..., n, d]

From one sub-layer straight to the next, in one pass over the streams:

    h, context = functional.advance(following, y, context)

With x the nd numbers of a token's streams and r their root mean square,

    [raw_pre, raw_post, raw_res] = x phi             n + n + k numbers
    H~ = alpha raw / r + bias                        (one alpha each)
    H_pre = sigmoid(H~_pre),  H_post = 2 sigmoid(H~_post),
    H_res = sinkhorn_project(H~_res)                 k = n^2

(Eq. 7-9 of arXiv 2512.24880, reordered as Eq. 14-19), or another
parameterisation of H_res, see `mixing`. The RMS norm's gain is absorbed in phi;
there is no tanh. bias is ordered [pre | post | res]; for Sinkhorn res is row by
row, and H_res_ij takes stream j to stream i.

`params` is any mapping with the arrays phi [nd, 2n + k], alpha [3] ([2] without
mixing) and bias [2n + k], float32. Mappings are float32 and lie tokens-minor,
[n, t] and [n, n, t], t being all leading dimensions of x flattened; streams and
what is read from them keep the dtype of x.
"""

from collections.abc import Mapping
import dataclasses
import functools
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import kernels
from mhc import manifold
from mhc import mixing as mixing_lib
from mhc import precision
from mhc.kernels.xla import streams

Params = Mapping[str, Any]  # arrays, or what `[...]` makes one


class Mappings(NamedTuple):
  """The three mappings of t tokens, float32; `res=None` stands for I."""

  pre: Float[Array, 'n t']
  post: Float[Array, 'n t']
  res: Float[Array, 'n n t'] | None


class Context(NamedTuple):
  """The streams and their mappings: from `pre` to `post`."""

  x: Float[Array, '*batch n d']
  mappings: Mappings | None


@dataclasses.dataclass(frozen=True)
class Options:
  """The static options of an mHC connection; hashable.

  Attributes:
    mixing: the parameterisation of H_res, see `mixing`.
    sinkhorn_iters: t_max, at least 1.
    sinkhorn_eps: 0 for Eq. 9; 1e-6 is what DeepSeek-V4's kernels use.
    sinkhorn_backward: see `sinkhorn_project`.
    norm_eps: added to the mean square of the streams.
    implementation: of the passes over the streams, see `mhc.kernels`.
  """

  mixing: mixing_lib.Mixing = 'sinkhorn'
  sinkhorn_iters: int = kernels.SINKHORN_ITERS
  sinkhorn_eps: float = kernels.SINKHORN_EPS
  sinkhorn_backward: manifold.Backward = 'recompute'
  norm_eps: float = 1e-20
  implementation: kernels.Implementation | None = None

  def __post_init__(self):
    known = typing.get_args(mixing_lib.Mixing)
    if self.mixing not in known:
      raise ValueError(f'mixing must be one of {known}, got {self.mixing!r}')


def init(
  dim: int,
  num_streams: int,
  index,
  mixing: mixing_lib.Mixing = 'sinkhorn',
) -> dict[str, Float[Array, '...']]:
  """Parameters from which the n copied streams stay equal.

  As in the paper's ICML version (App. A.6): phi = 0, alpha = 0.01, b_pre = -3
  but +3 at stream `index` mod n, b_post = 0, b_res = 6 I - 3. Then H_post = 1,
  the rows of H_res sum to one and a network whose sub-layers start with a norm
  equals the plain pre-norm one. The one-hot b_pre is what breaks the symmetry
  of the streams; with equal b_pre everywhere and phi = 0 they would stay equal
  for ever.

  Args:
    dim: d, the width of a stream.
    num_streams: n.
    index: of the sub-layer, attention and FFN counted apart.
    mixing: the parameterisation of H_res.

  Raises:
    ValueError: the parameterisation does not exist for n streams.
  """
  initial_stream = jnp.arange(num_streams) == index % num_streams
  bias = [
    jnp.where(initial_stream, 3.0, -3.0).astype(jnp.float32),
    jnp.zeros(num_streams),
    mixing_lib.initial_logits(mixing, num_streams),
  ]
  num_alphas = sum(part.size > 0 for part in bias)
  bias = jnp.concatenate(bias)
  return {
    'phi': jnp.zeros((num_streams * dim, bias.size)),
    'alpha': jnp.full(num_alphas, 0.01, jnp.float32),
    'bias': bias,
  }


def pre(
  params: Params,
  x: Float[Array, '*batch n d'],
  options: Options = Options(),
) -> tuple[Float[Array, '*batch d'], Context]:
  """H_pre x, what a sub-layer reads, and what `post` needs (Eq. 3)."""
  h, z = kernels.pre(
    tokens(x), *_reading(params, x), options.norm_eps, options.implementation
  )
  return _read_and_mapped(params, h, x, z, options)


def post(
  y: Float[Array, '*batch d'],
  context: Context,
  implementation: kernels.Implementation | None = None,
) -> Float[Array, '*batch n d']:
  """H_res x + H_post^T y, the streams behind a sub-layer (Eq. 3)."""
  x, mappings = context
  _check_output(y, x)
  return kernels.post(
    tokens(x),
    y.reshape(-1, y.shape[-1]),
    mappings.post,
    mappings.res,
    implementation,
  ).reshape(x.shape)


def advance(
  params: Params,
  y: Float[Array, '*batch d'],
  context: Context,
  options: Options = Options(),
) -> tuple[Float[Array, '*batch d'], Context]:
  """`post` of the sub-layer of `context`, `pre` of this one, in one pass."""
  x, mappings = context
  _check_output(y, x)
  x_next, h, z = kernels.advance(
    tokens(x),
    y.reshape(-1, y.shape[-1]),
    mappings.post,
    mappings.res,
    *_reading(params, x),
    options.norm_eps,
    options.implementation,
  )
  return _read_and_mapped(params, h, x_next.reshape(x.shape), z, options)


def mappings(
  params: Params, x: Float[Array, 't n d'], options: Options = Options()
) -> Mappings:
  """The mappings of t tokens (Eq. 14-19), without reading the streams."""
  z = streams.normed_projection(x, params['phi'][...], options.norm_eps).T
  z = precision.mark('mapping_logits', z)
  return _mappings(params, z, x.shape[1], options)


def read(
  x: Float[Array, '*batch n d'], weights: Float[Array, 'n t']
) -> Float[Array, '*batch d']:
  """sum_j weights_j x_j of every token."""
  h = precision.mark('sublayer_input', streams.read(tokens(x), weights))
  return h.reshape(*x.shape[:-2], x.shape[-1])


def tokens(x: Float[Array, '*batch n d']) -> Float[Array, 't n d']:
  """All leading dimensions as one."""
  return x.reshape(-1, *x.shape[-2:])


def named(mapped: Mappings) -> Mappings:
  """The mappings under their names, see `precision.mark`."""
  return jax.tree.map(functools.partial(precision.mark, 'mappings'), mapped)


def _reading(params, x):
  """phi, and alpha and bias of H_pre: arguments of the kernels."""
  return params['phi'][...], params['alpha'][0], params['bias'][: x.shape[-2]]


def _read_and_mapped(params, h, x, z, options):
  mapped = _mappings(params, z, x.shape[-2], options)
  h = h.reshape(*x.shape[:-2], x.shape[-1])
  return h, Context(x, named(mapped))


def _mappings(params, z, n, options):
  """Eq. 16-19, from the projection z = x phi / r, [2n + k, t]."""
  sizes = (n, n, len(z) - 2 * n) if len(z) > 2 * n else (n, n)
  alpha = jnp.repeat(
    params['alpha'][...], jnp.array(sizes), total_repeat_length=len(z)
  )
  logits = z * alpha[:, None] + params['bias'][...][:, None]
  res = None
  if options.mixing != 'identity':
    res = mixing_lib.matrices(
      options.mixing,
      logits[2 * n :],
      n,
      num_iters=options.sinkhorn_iters,
      eps=options.sinkhorn_eps,
      backward=options.sinkhorn_backward,
      implementation=options.implementation,
    )
  return Mappings(
    pre=jax.nn.sigmoid(logits[:n]),
    post=2 * jax.nn.sigmoid(logits[n : 2 * n]),
    res=res,
  )


def _check_output(y, x):
  if y.dtype != x.dtype:
    raise ValueError(
      f'the sub-layer returned {y.dtype}, the streams are {x.dtype}: '
      'cast its output'
    )
