r"""Residual connections over n streams, one interface for every kind.

A connection wraps one sub-layer F (attention or FFN, each has its own):

    h, context = connection.pre(x)        h = H_pre x
    x = connection.post(F(h), context)    x <- H_res x + H_post^T F(h)

(mHC, arXiv 2512.24880, Eq. 3) with the streams x in [..., n, d]. The kinds
differ in the three mappings and in nothing else:

    residual   n = 1, all mappings 1: the plain residual stream
    hc         unconstrained mappings (Hyper-Connections, arXiv 2409.19606)
    mhc        H_res projected onto the doubly stochastic matrices
    identity   mhc's H_pre and H_post with H_res = I

Around them, once per model, stand `streams.expand` and `streams.Collapse`.

The mappings are float32 and live tokens-minor, [n, t] and [n, n, t], t being
all leading dimensions of x flattened; streams and h keep the dtype of x.
"""

from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import config as config_lib
from mhc import manifold
from mhc import streams


class Mappings(NamedTuple):
  """The three mappings of t tokens, float32; `res=None` stands for I."""

  pre: Float[Array, 'n t']
  post: Float[Array, 'n t']
  res: Float[Array, 'n n t'] | None


class Context(NamedTuple):
  """What `post` needs from `pre`: the streams and their mappings."""

  x: Float[Array, '*batch n d']
  mappings: Mappings | None


class Residual(nnx.Module):
  """x + F(x) on a single stream; no parameters."""

  def pre(
    self, x: Float[Array, '*batch 1 d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return x[..., 0, :], Context(x, None)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch 1 d']:
    return context.x + y[..., None, :]


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
    self, dim: int, num_streams: int, index, *, norm_eps: float = 1e-20
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
    return _pre(self, x)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return _post(y, context)


class MHC(nnx.Module):
  r"""Manifold-constrained Hyper-Connections (Eq. 7-9, reordered as Eq. 14-19).

  With x the nd numbers of a token's streams and r their root mean square,

      [raw_pre, raw_post, raw_res] = x phi                  n + n + n^2 numbers
      H~ = alpha raw / r + bias                             (one alpha each)
      H_pre = sigmoid(H~_pre),  H_post = 2 sigmoid(H~_post),
      H_res = sinkhorn_project(H~_res)                      or I.

  The RMS norm's gain is absorbed in phi; there is no tanh. bias is ordered
  [pre | post | res row by row]; H_res_ij takes stream j to stream i.

  Initialised as in the paper's ICML version (App. A.6): phi = 0, alpha = 0.01,
  b_pre = -3 but +3 at stream `index` mod n, b_post = 0, b_res = 6 I - 3. Then
  H_post = 1, H_res is doubly stochastic and the n copied streams stay equal: a
  network whose sub-layers start with a norm equals the plain pre-norm one. The
  one-hot b_pre is what breaks the symmetry of the streams; with equal b_pre
  everywhere and phi = 0 they would stay equal for ever.

  `sinkhorn_eps` = 0 is Eq. 9; 1e-6 is what DeepSeek-V4's kernels use.

  nd (n^2 + 2n) + n^2 + 2n + 3 parameters; with `mixing='identity'` the terms
  of H_res go: 2 nd n + 2n + 2.
  """

  def __init__(
    self,
    dim: int,
    num_streams: int,
    index,
    *,
    mixing: Literal['sinkhorn', 'identity'] = 'sinkhorn',
    sinkhorn_iters: int = 20,
    sinkhorn_eps: float = 0.0,
    sinkhorn_backward: manifold.Backward = 'recompute',
    norm_eps: float = 1e-20,
  ):
    home = jnp.arange(num_streams) == index % num_streams
    bias = [
      jnp.where(home, 3.0, -3.0).astype(jnp.float32),
      jnp.zeros(num_streams),
    ]
    match mixing:
      case 'sinkhorn':
        bias.append(6.0 * jnp.eye(num_streams).reshape(-1) - 3.0)
      case 'identity':
        pass
      case _:
        raise ValueError(
          f"mixing must be 'sinkhorn' or 'identity', got {mixing!r}"
        )
    sizes = tuple(part.size for part in bias)
    self.phi = nnx.Param(jnp.zeros((num_streams * dim, sum(sizes))))
    self.alpha = nnx.Param(jnp.full(len(sizes), 0.01, jnp.float32))
    self.bias = nnx.Param(jnp.concatenate(bias))
    self.shape = (num_streams, dim)
    self.sizes = sizes
    self.project = dict(
      num_iters=sinkhorn_iters, eps=sinkhorn_eps, backward=sinkhorn_backward
    )
    self.norm_eps = norm_eps

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    num_tokens, n, _ = x.shape
    raw = streams.normed_projection(x, self.phi[...], self.norm_eps)
    alpha = jnp.repeat(
      self.alpha[...], jnp.array(self.sizes), total_repeat_length=raw.shape[1]
    )
    logits = (raw * alpha[None] + self.bias[...][None]).T
    return Mappings(
      pre=jax.nn.sigmoid(logits[:n]),
      post=2 * jax.nn.sigmoid(logits[n : 2 * n]),
      res=manifold.sinkhorn_project(
        logits[2 * n :].reshape(n, n, num_tokens), axes=(0, 1), **self.project
      )
      if len(self.sizes) == 3
      else None,
    )

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return _pre(self, x)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return _post(y, context)


Connection = Residual | HC | MHC


def make(
  config: config_lib.ConnectionConfig, dim: int, index, norm_eps: float
) -> Connection:
  """The connection of sub-layer `index` (attention and FFN counted apart)."""
  shape = (dim, config.streams, index)
  sinkhorn = dict(
    sinkhorn_iters=config.sinkhorn_iters,
    sinkhorn_eps=config.sinkhorn_eps,
    sinkhorn_backward=config.sinkhorn_backward,
  )
  match config.kind:
    case 'residual':
      return Residual()
    case 'hc':
      return HC(*shape, norm_eps=norm_eps)
    case 'mhc':
      return MHC(*shape, norm_eps=norm_eps, **sinkhorn)
    case 'identity':
      return MHC(*shape, norm_eps=norm_eps, mixing='identity')


def advance(
  connection: Connection,
  following: Connection,
  y: Float[Array, '*batch d'],
  context: Context,
) -> tuple[Float[Array, '*batch d'], Context]:
  """Leaves one sub-layer and enters the next: `following.pre . post`."""
  return following.pre(connection.post(y, context))


def mixing_matrices(context: Context) -> Float[Array, 't n n']:
  """H_res of every token, I where the kind has no mixing."""
  n = context.x.shape[-2]
  num_tokens = context.x.size // (n * context.x.shape[-1])
  if context.mappings is None or context.mappings.res is None:
    return jnp.broadcast_to(jnp.eye(n), (num_tokens, n, n))
  return jnp.moveaxis(context.mappings.res, -1, 0)


def _pre(connection, x):
  *batch, n, dim = x.shape
  if (n, dim) != connection.shape:
    raise ValueError(
      f'this connection has {connection.shape[0]} streams of width '
      f'{connection.shape[1]}, got x of shape {x.shape}: open streams once, '
      'with expand, before the first sub-layer'
    )
  tokens = x.reshape(-1, n, dim)
  mappings = connection.mappings(tokens)
  h = streams.read(tokens, mappings.pre)
  return h.reshape(*batch, dim), Context(x, mappings)


def _post(y, context):
  x, mappings = context
  tokens = x.reshape(-1, *x.shape[-2:])
  if y.dtype != x.dtype:
    raise ValueError(
      f'the sub-layer returned {y.dtype}, the streams are {x.dtype}: '
      'cast its output'
    )
  flat = y.reshape(-1, y.shape[-1])
  out = streams.write(tokens, flat, mappings.post, mappings.res)
  return out.reshape(x.shape)
