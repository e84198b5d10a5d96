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

For ablations each mapping is 'dynamic' (as above), 'static' (phi = 0: the bias
alone) or 'off', the constants by which the paper's Table 1 replaces a mapping:
H_pre = 1/n, H_post = 1, H_res = I. What a part does not use trains no more:
whatever `params` holds there counts as its constant and gets gradient 0.

`params` is any mapping with the arrays phi [nd, 2n + k], alpha [3] ([2] without
mixing) and bias [2n + k], float32. Mappings are float32 and lie tokens-minor,
[n, t] and [n, n, t], t being all leading dimensions of x flattened; streams and
what is read from them keep the dtype of x.

Gradients are for reverse mode, to any order. Forward mode (`jax.jvp`,
`jax.hessian`) needs implementation='autodiff', or JAX raises a TypeError.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float
import numpy as np

from mhc import arguments
from mhc import explicit
from mhc import kernels
from mhc import manifold
from mhc import mixing as mixing_lib
from mhc import observation
from mhc import precision
from mhc.context import Context, Mappings
from mhc.kernels.autodiff import ops as autodiff
from mhc.kernels.xla import streams

Params = Mapping[str, Any]  # arrays, or what `[...]` makes one
Part = Literal['dynamic', 'static', 'off']


@dataclasses.dataclass(frozen=True)
class Options:
  """The static options of an mHC connection; hashable.

  Attributes:
    mixing: the parameterisation of H_res, see `mixing`.
    sinkhorn_iters: t_max, at least 1.
    sinkhorn_eps: 0 for Eq. 9; 1e-6 is what DeepSeek-V4's kernels use.
    sinkhorn_backward, sinkhorn_method: see `sinkhorn_project`.
    norm_eps: added to the mean square of the streams.
    implementation: of the passes over the streams, see `mhc.kernels`.
    pre, post, res: how each mapping comes about, see the top of the file.
      res='off' is mixing='identity', without logits.
    go_size: s of mixing='go'.
  """

  mixing: mixing_lib.Mixing = 'sinkhorn'
  sinkhorn_iters: int = kernels.SINKHORN_ITERS
  sinkhorn_eps: float = kernels.SINKHORN_EPS
  sinkhorn_backward: manifold.Backward = 'recompute'
  sinkhorn_method: manifold.Method = 'sinkhorn'
  norm_eps: float = 1e-20
  implementation: kernels.Implementation | None = None
  pre: Part = 'dynamic'
  post: Part = 'dynamic'
  res: Part = 'dynamic'
  go_size: int = 2

  def __post_init__(self):
    known = typing.get_args(mixing_lib.Mixing)
    if self.mixing not in known:
      raise ValueError(f'mixing must be one of {known}, got {self.mixing!r}')
    check_parts(pre=self.pre, post=self.post, res=self.res)
    if self.sinkhorn_method == 'newton':
      manifold.check_newton(self.sinkhorn_backward, self.sinkhorn_eps)
    if self.go_size < 1:
      raise ValueError(f'go_size={self.go_size} must be at least 1')
    if self.mixing == 'identity' and self.res != 'dynamic':
      raise ValueError(
        f"res={self.res!r} would not be used: mixing='identity' is H_res = I "
        "already; leave res='dynamic'"
      )

  @property
  def mixing_used(self) -> mixing_lib.Mixing:
    """The parameterisation of H_res behind `res`."""
    return 'identity' if self.res == 'off' else self.mixing

  @property
  def mixes(self) -> bool:
    """Whether H_res may differ from I."""
    return self.mixing_used != 'identity'


def check_parts(**parts: str):
  """Checks the words for how mappings come about.

  Raises:
    ValueError: one is unknown.
  """
  for name, part in parts.items():
    if part not in typing.get_args(Part):
      raise ValueError(
        f'{name} must be one of {typing.get_args(Part)}, got {part!r}'
      )


def init(
  dim: int,
  num_streams: int,
  index,
  mixing: mixing_lib.Mixing = 'sinkhorn',
  *,
  pre: Part = 'dynamic',
  res: Part = 'dynamic',
  res_diagonal: float = 6.0,
  go_size: int = 2,
  init: mixing_lib.Init = 'mhc',
) -> dict[str, Float[Array, '...']]:
  """Parameters from which the n copied streams stay equal.

  As in the paper's ICML version (App. A.6): phi = 0, alpha = 0.01, b_pre = -3
  but +3 at stream `index` mod n, b_post = 0, b_res = 6 I - 3. Then H_post = 1,
  the rows of H_res sum to one and a network whose sub-layers start with a norm
  equals the plain pre-norm one. The one-hot b_pre is what breaks the symmetry
  of the streams; with equal b_pre everywhere and phi = 0 they would stay equal
  for ever, and so they do with pre='off' if they are opened as copies: use
  `expand(..., scale='random')`. post='off' starts as any other.

  Args:
    dim: d, the width of a stream.
    num_streams: n.
    index: of the sub-layer, attention and FFN counted apart.
    mixing: the parameterisation of H_res.
    pre, res: as in `Options`; 'off' has the bias of H_pre = 1/n and no logits.
    res_diagonal, go_size: see `mixing.initial_logits`.
    init: 'authors' is the start of the code of mHC-lite and KromHC, which is
      no plain residual network: b_pre and b_post are -1, but +1 at stream
      `index` mod n, and b_res is as in `mixing.initial_logits`.

  Raises:
    ValueError: the parameterisation does not exist for n streams or has no
      such start, or a number is not a whole one in its range.
  """
  arguments.check_place(dim, num_streams, index)
  options = Options(mixing, pre=pre, res=res)
  initial_stream = first_read(index, num_streams)
  read = jnp.where(initial_stream, 3.0, -3.0).astype(jnp.float32)
  write = jnp.zeros(num_streams, jnp.float32)
  if init == 'authors':
    read = write = read / 3
  if pre == 'off':
    read = jnp.full(num_streams, uniform_read(num_streams), jnp.float32)
  bias = [
    read,
    write,
    mixing_lib.initial_logits(
      options.mixing_used, num_streams, res_diagonal, init, go_size=go_size
    ),
  ]
  num_alphas = sum(part.size > 0 for part in bias)
  bias = jnp.concatenate(bias)
  return {
    'phi': jnp.zeros((num_streams * dim, bias.size), jnp.float32),
    'alpha': jnp.full(num_alphas, 0.01, jnp.float32),
    'bias': bias,
  }


def pre(
  params: Params,
  x: Float[Array, '*batch n d'],
  options: Options = Options(),
) -> tuple[Float[Array, '*batch d'], Context]:
  """H_pre x, what a sub-layer reads, and what `post` needs (Eq. 3).

  Raises:
    ValueError: x and phi are not of the same streams.
  """
  params = _with_constants(params, x, options)

  def run(params, x):
    h, z = kernels.pre(
      tokens(x), *_reading(params, x), options.norm_eps, options.implementation
    )
    return _read_and_mapped(params, h, x, z, options)

  specs = functools.partial(_specs_read, mixes=options.mixes)
  h, context = explicit.call(run, x, specs, params, x)
  observation.record(context.x, context.mappings)
  return h, context


def post(
  y: Float[Array, '*batch d'],
  context: Context,
  implementation: kernels.Implementation | None = None,
) -> Float[Array, '*batch n d']:
  """H_res x + H_post^T y, the streams behind a sub-layer (Eq. 3).

  Raises:
    ValueError: y is not what a sub-layer returns that has read `context`.
  """
  arguments.check_output(y, *context)

  def run(y, x, mappings):
    return kernels.post(
      tokens(x),
      _flat(y, 1),
      mappings.post,
      mappings.res,
      implementation,
    ).reshape(x.shape)

  return explicit.call(run, context.x, lambda spec: spec, y, *context)


def advance(
  params: Params,
  y: Float[Array, '*batch d'],
  context: Context,
  options: Options = Options(),
) -> tuple[Float[Array, '*batch d'], Context]:
  """`post` of the sub-layer of `context`, `pre` of this one, in one pass.

  Raises:
    ValueError: as `pre` and `post` do.
  """
  arguments.check_output(y, *context)
  params = _with_constants(params, context.x, options)

  def run(params, y, x, mappings):
    x_next, h, z = kernels.advance(
      tokens(x),
      _flat(y, 1),
      mappings.post,
      mappings.res,
      *_reading(params, x),
      options.norm_eps,
      options.implementation,
    )
    return _read_and_mapped(params, h, x_next.reshape(x.shape), z, options)

  specs = functools.partial(_specs_read, mixes=options.mixes)
  h, context = explicit.call(run, context.x, specs, params, y, *context)
  observation.record(context.x, context.mappings)
  return h, context


def mappings(
  params: Params, x: Float[Array, 't n d'], options: Options = Options()
) -> Mappings:
  """The mappings of t tokens (Eq. 14-19), without reading the streams."""
  params = _with_constants(params, x, options)
  project = streams.normed_projection
  if options.implementation == 'autodiff':
    project = autodiff.normed_projection
  z = project(x, params['phi'], options.norm_eps).T
  z = precision.mark('mapping_logits', z)
  return _mappings(params, z, x.shape[1], options)


def read(
  x: Float[Array, '*batch n d'],
  weights: Float[Array, 'n t'],
  implementation: kernels.Implementation | None = None,
) -> Float[Array, '*batch d']:
  """sum_j weights_j x_j of every token; no kernel has it alone."""
  weighted = autodiff.read if implementation == 'autodiff' else streams.read

  def run(x, weights):
    h = precision.mark('sublayer_input', weighted(tokens(x), weights))
    return h.reshape(*x.shape[:-2], x.shape[-1])

  return explicit.call(run, x, spec_read, x, weights)


def tokens(x: Float[Array, '*batch n d']) -> Float[Array, 't n d']:
  """All leading dimensions as one."""
  return _flat(x, 2)


def spec_read(spec: PartitionSpec) -> PartitionSpec:
  """The spec of [..., d], read from streams [..., n, d] with this one."""
  return PartitionSpec(*spec[:-2], spec[-1])


def specs_mappings(spec: PartitionSpec, mixes: bool) -> Mappings:
  """The specs of mappings [n, t] and [n, n, t] of streams with this spec."""
  t = explicit.merged(*spec[:-2])
  two, three = PartitionSpec(None, t), PartitionSpec(None, None, t)
  return Mappings(two, two, three if mixes else None)


def float32(params: Params) -> dict[str, Float[Array, '...']]:
  """The parameters as float32 arrays, whatever they were given as."""
  return {n: jnp.asarray(p[...], jnp.float32) for n, p in params.items()}


def named(mapped: Mappings) -> Mappings:
  """The mappings under their names, see `precision.mark`."""
  return jax.tree.map(functools.partial(precision.mark, 'mappings'), mapped)


def where_parts(
  parts: tuple[Part, ...], chosen: tuple[Part, ...], sizes: tuple[int, ...]
) -> Bool[np.ndarray, 'k']:
  """Whether the part that each of k numbers belongs to is a chosen word."""
  return np.repeat([part in chosen for part in parts], sizes)


def _flat(x, kept):
  """All dimensions but the last `kept` as one, also where one is empty."""
  return x.reshape(math.prod(x.shape[:-kept]), *x.shape[-kept:])


def _specs_read(spec, mixes):
  """The specs of what `pre` returns, for those of the streams."""
  return spec_read(spec), Context(spec, specs_mappings(spec, mixes))


def _with_constants(params, x, options):
  """The parameters as float32 arrays, or constants for parts that are off.

  A select has gradient 0 there, and leaves the kernels as they are: they see
  phi = 0. alpha multiplies x phi = 0 and needs no constant.
  """
  params = float32(params)
  phi, bias = params['phi'], params['bias']
  n = x.shape[-2]
  arguments.check_streams(x, n, len(phi) // n)
  parts = options.pre, options.post, options.res
  if parts == ('dynamic',) * 3:
    return params
  sizes = n, n, len(bias) - 2 * n
  dynamic = where_parts(parts, ('dynamic',), sizes)
  learned = where_parts(parts, ('dynamic', 'static'), sizes)
  off = np.repeat(np.float32([uniform_read(n), 0, 0]), sizes)
  return {
    'phi': jnp.where(dynamic[None], phi, jnp.zeros_like(phi)),
    'alpha': params['alpha'],
    'bias': jnp.where(learned, bias, off),
  }


def first_read(index, n: int) -> Bool[Array, 'n']:
  """Whether a stream is the one that sub-layer `index` reads first."""
  return jnp.arange(n) == jnp.asarray(index % n, jnp.arange(n).dtype)


def uniform_read(n):
  """The bias of H_pre = 1/n: sigmoid(-log(n - 1)).

  Its limit for one stream is infinite; sigmoid(40) is 1 in float64 as well.
  """
  return -math.log(n - 1) if n > 1 else 40.0


def _reading(params, x):
  """phi, and alpha and bias of H_pre: arguments of the kernels."""
  return params['phi'], params['alpha'][0], params['bias'][: x.shape[-2]]


def _read_and_mapped(params, h, x, z, options):
  mapped = _mappings(params, z, x.shape[-2], options)
  h = h.reshape(*x.shape[:-2], x.shape[-1])
  return h, Context(x, named(mapped))


def _mappings(params, z, n, options):
  """Eq. 16-19, from the projection z = x phi / r, [2n + k, t]."""
  sizes = (n, n, len(z) - 2 * n) if len(z) > 2 * n else (n, n)
  alpha = jnp.repeat(
    params['alpha'], jnp.array(sizes), total_repeat_length=len(z)
  )
  logits = z * alpha[:, None] + params['bias'][:, None]
  res = None
  if options.mixes:
    res = mixing_lib.matrices(
      options.mixing_used,
      logits[2 * n :],
      n,
      num_iters=options.sinkhorn_iters,
      eps=options.sinkhorn_eps,
      backward=options.sinkhorn_backward,
      method=options.sinkhorn_method,
      implementation=options.implementation,
      go_size=options.go_size,
    )
  return Mappings(
    pre=jax.nn.sigmoid(logits[:n]),
    post=2 * jax.nn.sigmoid(logits[n : 2 * n]),
    res=res,
  )
