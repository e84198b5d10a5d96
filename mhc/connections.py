r"""Connections: the residual around a sub-layer, one stream or n of them.

    h, context = connection.pre(x)          # streams [..., n, d] -> [..., d]
    x = connection.post(F(h), context)      # streams [..., n, d]

From one sub-layer straight to the next, in one pass over the streams:

    h, context = following.advance(F(h), context)

`Residual` is the plain residual stream, `HC` mixes its streams freely
(arXiv 2409.19606), `MHC` by matrices of a constrained kind, doubly stochastic
ones by default (arXiv 2512.24880), and `SinglePass` is mHC with the read
weights one sub-layer early (DeepSeek-V4.1). Around them, once per model, stand
`expand` and `Collapse`, see `streams`.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import functional
from mhc import kernels
from mhc import precision
from mhc.functional import Context, Mappings
from mhc.kernels.xla import streams


class Residual(nnx.Module):
  """x + F(x) on a single stream; no parameters."""

  def pre(
    self, x: Float[Array, '*batch 1 d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return precision.mark('sublayer_input', x[..., 0, :]), Context(x, None)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch 1 d']:
    return precision.mark('streams', context.x + y[..., None, :])

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


class HC(nnx.Module):
  r"""Dynamic Hyper-Connections (arXiv 2409.19606, Sec. 3; restated as Eq. 5).

  With x~ the streams, each RMS-normalised over d with a learned gain,

      H_pre  = s_width tanh(theta_pre . x~_j) + b_pre        [n]
      H_post = s_depth tanh(theta_post . x~_i) + b_post      [n]
      H_res  = s_width tanh(theta_res_i . x~_j) + b_res      [n, n]

  Initialised as there: dynamic weights theta = 0, scales 0.01 (one shared by
  H_pre and H_res), b_pre = one-hot at stream `index` mod n, b_post = 1,
  b_res = I. d + d (n + 2) + n (n + 2) + 2 parameters.

  `pre`, `post` and `res` choose each mapping for ablations, as in `functional`:
  'static' drops its theta, 'off' is H_pre = 1/n, H_post = 1 or H_res = I. The
  parameters are the same ones; what is not used starts as that constant and
  does not train.

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
    implementation: kernels.Implementation | None = None,
    pre: functional.Part = 'dynamic',
    post: functional.Part = 'dynamic',
    res: functional.Part = 'dynamic',
  ):
    functional.check_parts(pre=pre, post=post, res=res)
    initial_read = jnp.full(num_streams, 1 / num_streams, jnp.float32)
    if pre != 'off':
      initial_stream = jnp.arange(num_streams) == index % num_streams
      initial_read = initial_stream.astype(jnp.float32)
    self.gain = nnx.Param(jnp.ones(dim))
    self.theta_pre = nnx.Param(jnp.zeros(dim))
    self.theta_post = nnx.Param(jnp.zeros(dim))
    self.theta_res = nnx.Param(jnp.zeros((num_streams, dim)))
    self.alpha = nnx.Param(jnp.full(2, 0.01, jnp.float32))  # s_width, s_depth
    self.bias_pre = nnx.Param(initial_read)
    self.bias_post = nnx.Param(jnp.ones(num_streams))
    self.bias_res = nnx.Param(jnp.eye(num_streams))
    self.shape = (num_streams, dim)
    self.parts = (pre, post, res)
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
    n, parts = len(theta) - 2, self.parts
    if parts != ('dynamic',) * 3:
      used = functional.where_parts(parts, ('dynamic',), (1, 1, n))
      theta = jnp.where(used[:, None], theta, jnp.zeros_like(theta))
    dynamic = jnp.tanh(
      jnp.einsum('tjd,kd->tjk', normed, theta, precision=streams.HIGHEST)
    )
    dynamic = jnp.moveaxis(dynamic, 0, -1)  # [j, k, t]
    width, depth = self.alpha[...]
    bias_pre, bias_post = self.bias_pre[...], self.bias_post[...]
    if parts[0] == 'off':
      bias_pre = jnp.full_like(bias_pre, 1 / n)
    if parts[1] == 'off':
      bias_post = jnp.ones_like(bias_post)
    mapped = Mappings(
      pre=width * dynamic[:, 0] + bias_pre[:, None],
      post=depth * dynamic[:, 1] + bias_post[:, None],
      res=None,
    )
    if parts[2] == 'off':
      return mapped
    res = width * jnp.swapaxes(dynamic[:, 2:], 0, 1)
    return mapped._replace(res=res + self.bias_res[...][..., None])

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    context = _context(self, x)
    return functional.read(x, context.mappings.pre), context

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return functional.post(y, context, self.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


class MHC(nnx.Module):
  r"""Manifold-constrained Hyper-Connections; `functional` has the equations.

  Parameters: phi [nd, 2n + k], alpha [3] ([2] without mixing) and bias
  [2n + k], with k logits of H_res: (nd + 1) (2n + k) + 3 numbers. They start so
  that the n copied streams stay equal, see `functional.init`.

  Args:
    dim: d, the width of a stream.
    num_streams: n.
    index: of the sub-layer in the network, attention and FFN counted apart. It
      chooses the stream that the sub-layer reads first.
    res_diagonal: see `mixing.initial_logits`.
    options: fields of `functional.Options`.
  """

  def __init__(
    self,
    dim: int,
    num_streams: int,
    index,
    *,
    res_diagonal: float = 6.0,
    **options,
  ):
    self.options = functional.Options(**options)
    params = functional.init(
      dim,
      num_streams,
      index,
      self.options.mixing,
      pre=self.options.pre,
      res=self.options.res,
      res_diagonal=res_diagonal,
    )
    self.phi = nnx.Param(params['phi'])
    self.alpha = nnx.Param(params['alpha'])
    self.bias = nnx.Param(params['bias'])
    self.shape = (num_streams, dim)

  @property
  def params(self) -> functional.Params:
    return {'phi': self.phi, 'alpha': self.alpha, 'bias': self.bias}

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    return functional.mappings(self.params, x, self.options)

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    _check_streams(self, x)
    return functional.pre(self.params, x, self.options)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return functional.post(y, context, self.options.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one, in one pass."""
    _check_streams(self, context.x)
    return functional.advance(self.params, y, context, self.options)


class StreamsWithPre(NamedTuple):
  """Streams, and the H_pre by which the next sub-layer reads them."""

  x: Float[Array, '*batch n d']
  weights: Float[Array, 'n t']

  def read(self) -> Float[Array, '*batch d']:
    return functional.read(self.x, self.weights)


class SinglePass(nnx.Module):
  r"""mHC with the read weights computed one sub-layer early.

      x <- H_res,l x + H_post,l^T F_l(H_pre,l-1 x)

  (DeepSeek-V4.1, arXiv 2609.19969), so that one pass over the streams can write
  them back and read for the next sub-layer. The first sub-layer reads stream 0;
  the weights of the last close the streams. Between sub-layers the streams
  travel with the weights that the next one reads by: `StreamsWithPre`.

  Parameters and their initial values are those of `MHC`, with the initial
  stream of the sub-layer that will read; so `pre` among its options is about
  what the next sub-layer reads. The first reads stream 0 in any case.
  """

  def __init__(self, dim: int, num_streams: int, index, **options):
    self.next_mhc = MHC(dim, num_streams, index + 1, **options)

  def pre(
    self, state: StreamsWithPre
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return state.read(), _context(self.next_mhc, state.x)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> StreamsWithPre:
    return StreamsWithPre(self.next_mhc.post(y, context), context.mappings.pre)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


def _context(connection, x):
  """The mappings of connections that do not read in the same pass."""
  _check_streams(connection, x)
  mappings = connection.mappings(functional.tokens(x))
  return Context(x, functional.named(mappings))


def _check_streams(connection, x):
  if x.shape[-2:] != connection.shape:
    n, dim = connection.shape
    raise ValueError(
      f'this connection has {n} streams of width {dim}, got x of shape '
      f'{x.shape}: open streams once, with expand, before the first sub-layer'
    )
