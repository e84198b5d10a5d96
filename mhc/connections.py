"""Hyper-Connections: mappings of n streams, free (HC) or constrained (mHC).

Each class maps the streams x, [..., n, d], to the three mappings of Eq. 3 and
applies them: `pre` reads, `post` mixes and writes, and `advance` is the `post`
of one sub-layer with the `pre` of the next, which a fused kernel does in one
pass over the streams (see kernels/). Mappings are float32 and lie tokens-minor,
[n, t] and [n, n, t], t being all leading dimensions of x flattened; streams and
what is read from them keep the dtype of x.
"""

import functools
import typing
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import manifold
from mhc import mixing as mixing_lib
from mhc import precision
from mhc import streams
from mhc.kernels import api


class Mappings(NamedTuple):
  """The three mappings of t tokens, float32; `res=None` stands for I."""

  pre: Float[Array, 'n t']
  post: Float[Array, 'n t']
  res: Float[Array, 'n n t'] | None


class Context(NamedTuple):
  """What `post` needs from `pre`: the streams and their mappings."""

  x: Float[Array, '*batch n d']
  mappings: Mappings | None


class Ahead(NamedTuple):
  """Streams, and the weights by which the next sub-layer reads them."""

  x: Float[Array, '*batch n d']
  weights: Float[Array, 'n t']

  def read(self) -> Float[Array, '*batch d']:
    return _read(self.x, self.weights)


class Sublayer(NamedTuple):
  """Between sub-layers: the output y of the last one, not written back yet."""

  y: Float[Array, '*batch d']
  context: Context


class HC(nnx.Module):
  r"""Dynamic Hyper-Connections (arXiv 2409.19606, Sec. 3; restated as Eq. 5).

  With x~ the streams, each RMS-normalised over d with a learned gain,

      H_pre  = s_width tanh(theta_pre . x~_j) + b_pre        [n]
      H_post = s_depth tanh(theta_post . x~_i) + b_post      [n]
      H_res  = s_width tanh(theta_res_i . x~_j) + b_res      [n, n]

  Initialised as there: dynamic weights theta = 0, scales 0.01 (one shared by
  H_pre and H_res), b_pre = one-hot at stream `index` mod n, b_post = 1,
  b_res = I. d + d (n + 2) + n (n + 2) + 2 parameters.

  The HC paper also scales the initial output projections of F by sqrt(n). Those
  weights belong to F, and the scaling would make HC start from another function
  than the other kinds, so it is left out here.
  """

  def __init__(
    self,
    dim: int,
    num_streams: int,
    index,
    *,
    norm_eps: float = 1e-20,
    implementation: api.Implementation | None = None,
  ):
    home = jnp.arange(num_streams) == index % num_streams
    self.gain = nnx.Param(jnp.ones(dim))
    self.theta_pre = nnx.Param(jnp.zeros(dim))
    self.theta_post = nnx.Param(jnp.zeros(dim))
    self.theta_res = nnx.Param(jnp.zeros((num_streams, dim)))
    self.alpha = nnx.Param(jnp.full(2, 0.01, jnp.float32))  # s_width, s_depth
    self.bias_pre = nnx.Param(home.astype(jnp.float32))
    self.bias_post = nnx.Param(jnp.ones(num_streams))
    self.bias_res = nnx.Param(jnp.eye(num_streams))
    self.shape = (num_streams, dim)
    self.norm_eps = norm_eps
    self.implementation = implementation

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.norm_eps)
    normed = normed * self.gain[...][None, None]
    theta = jnp.concatenate(
      [
        self.theta_pre[...][None],
        self.theta_post[...][None],
        self.theta_res[...],
      ]
    )
    dynamic = jnp.tanh(
      jnp.einsum('tjd,kd->tjk', normed, theta, precision=streams.HIGHEST)
    )
    dynamic = jnp.moveaxis(dynamic, 0, -1)  # [j, k, t]
    width, depth = self.alpha[...]
    return Mappings(
      pre=width * dynamic[:, 0] + self.bias_pre[...][:, None],
      post=depth * dynamic[:, 1] + self.bias_post[...][:, None],
      res=width * jnp.swapaxes(dynamic[:, 2:], 0, 1)
      + self.bias_res[...][..., None],
    )

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    context = _context(self, x)
    return _read(x, context.mappings.pre), context

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return _post(y, context, self.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


class MHC(nnx.Module):
  r"""Manifold-constrained Hyper-Connections (Eq. 7-9, reordered as Eq. 14-19).

  With x the nd numbers of a token's streams and r their root mean square,

      [raw_pre, raw_post, raw_res] = x phi             n + n + k numbers
      H~ = alpha raw / r + bias                        (one alpha each)
      H_pre = sigmoid(H~_pre),  H_post = 2 sigmoid(H~_post),
      H_res = sinkhorn_project(H~_res)                 k = n^2

  or another parameterisation of H_res, see `mixing`. The RMS norm's gain is
  absorbed in phi; there is no tanh. bias is ordered [pre | post | res]; for
  Sinkhorn res is row by row, and H_res_ij takes stream j to stream i.

  Initialised as in the paper's ICML version (App. A.6): phi = 0, alpha = 0.01,
  b_pre = -3 but +3 at stream `index` mod n, b_post = 0, b_res = 6 I - 3. Then
  H_post = 1, the rows of H_res sum to one and the n copied streams stay equal:
  a network whose sub-layers start with a norm equals the plain pre-norm one.
  The one-hot b_pre is what breaks the symmetry of the streams; with equal b_pre
  everywhere and phi = 0 they would stay equal for ever.

  `sinkhorn_eps` = 0 is Eq. 9; 1e-6 is what DeepSeek-V4's kernels use.

  (nd + 1) (2n + k) + 3 parameters; without mixing (k = 0) one alpha less.
  """

  def __init__(
    self,
    dim: int,
    num_streams: int,
    index,
    *,
    mixing: mixing_lib.Mixing = 'sinkhorn',
    sinkhorn_iters: int = 20,
    sinkhorn_eps: float = 0.0,
    sinkhorn_backward: manifold.Backward = 'recompute',
    norm_eps: float = 1e-20,
    implementation: api.Implementation | None = None,
  ):
    if mixing not in typing.get_args(mixing_lib.Mixing):
      raise ValueError(
        f'mixing must be one of {typing.get_args(mixing_lib.Mixing)}, '
        f'got {mixing!r}'
      )
    home = jnp.arange(num_streams) == index % num_streams
    bias = [
      jnp.where(home, 3.0, -3.0).astype(jnp.float32),
      jnp.zeros(num_streams),
      mixing_lib.initial_logits(mixing, num_streams),
    ]
    sizes = tuple(part.size for part in bias if part.size)
    self.phi = nnx.Param(jnp.zeros((num_streams * dim, sum(sizes))))
    self.alpha = nnx.Param(jnp.full(len(sizes), 0.01, jnp.float32))
    self.bias = nnx.Param(jnp.concatenate(bias))
    self.shape = (num_streams, dim)
    self.sizes = sizes
    self.mixing = mixing
    self.sinkhorn = dict(
      num_iters=sinkhorn_iters,
      eps=sinkhorn_eps,
      backward=sinkhorn_backward,
      implementation=implementation,
    )
    self.norm_eps = norm_eps
    self.implementation = implementation

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    z = streams.normed_projection(x, self.phi[...], self.norm_eps).T
    return self._mappings(precision.mark('mapping_logits', z))

  def _mappings(self, z):
    """Eq. 16-19, from the projection z = x phi / r, [k, t]."""
    n = self.shape[0]
    alpha = jnp.repeat(
      self.alpha[...], jnp.array(self.sizes), total_repeat_length=len(z)
    )
    logits = z * alpha[:, None] + self.bias[...][:, None]
    res = None
    if self.mixing != 'identity':
      res = mixing_lib.matrices(
        self.mixing, logits[2 * n :], n, **self.sinkhorn
      )
    return Mappings(
      pre=jax.nn.sigmoid(logits[:n]),
      post=2 * jax.nn.sigmoid(logits[n : 2 * n]),
      res=res,
    )

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    _check_streams(self, x)
    h, z = api.pre(_tokens(x), *self._reading(), self.implementation)
    return self._entered(h, x, z)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return _post(y, context, self.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one, in one pass."""
    x, mappings = context
    _check_streams(self, x)
    _check_output(y, x)
    x_next, h, z = api.advance(
      _tokens(x),
      y.reshape(-1, y.shape[-1]),
      mappings.post,
      mappings.res,
      *self._reading(),
      self.implementation,
    )
    return self._entered(h, x_next.reshape(x.shape), z)

  def _reading(self):
    """phi, and alpha and bias of H_pre: what the kernels read by."""
    n = self.shape[0]
    return self.phi[...], self.alpha[0], self.bias[:n], self.norm_eps

  def _entered(self, h, x, z):
    mark = functools.partial(precision.mark, 'mappings')
    mappings = jax.tree.map(mark, self._mappings(z))
    return h.reshape(*x.shape[:-2], x.shape[-1]), Context(x, mappings)


class SinglePass(nnx.Module):
  r"""mHC with the read weights computed one sub-layer early.

      x <- H_res,l x + H_post,l^T F_l(H_pre,l-1 x)

  (DeepSeek-V4.1, arXiv 2609.19969), so that one pass over the streams can write
  them back and read for the next sub-layer. The first sub-layer reads stream 0;
  the weights of the last close the streams. Between sub-layers the state is the
  streams with the weights that the next one reads by: `Ahead`.

  Parameters and their initial values are those of `MHC`, with the home stream
  of the sub-layer that will read.
  """

  def __init__(self, dim: int, num_streams: int, index, **options):
    self.inner = MHC(dim, num_streams, index + 1, **options)

  def pre(self, state: Ahead) -> tuple[Float[Array, '*batch d'], Context]:
    return state.read(), _context(self.inner, state.x)

  def post(self, y: Float[Array, '*batch d'], context: Context) -> Ahead:
    x = _post(y, context, self.inner.implementation)
    return Ahead(x, context.mappings.pre)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


def _tokens(x):
  return x.reshape(-1, *x.shape[-2:])


def _check_streams(connection, x):
  if x.shape[-2:] != connection.shape:
    n, dim = connection.shape
    raise ValueError(
      f'this connection has {n} streams of width {dim}, got x of shape '
      f'{x.shape}: open streams once, with expand, before the first sub-layer'
    )


def _check_output(y, x):
  if y.dtype != x.dtype:
    raise ValueError(
      f'the sub-layer returned {y.dtype}, the streams are {x.dtype}: '
      'cast its output'
    )


def _context(connection, x):
  _check_streams(connection, x)
  mark = functools.partial(precision.mark, 'mappings')
  return Context(x, jax.tree.map(mark, connection.mappings(_tokens(x))))


def _read(x, weights):
  h = precision.mark('sublayer_input', streams.read(_tokens(x), weights))
  return h.reshape(*x.shape[:-2], x.shape[-1])


def _post(y, context, implementation):
  x, mappings = context
  _check_output(y, x)
  return api.post(
    _tokens(x),
    y.reshape(-1, y.shape[-1]),
    mappings.post,
    mappings.res,
    implementation,
  ).reshape(x.shape)
