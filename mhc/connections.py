r"""Connections: the residual around a sub-layer, one stream or n of them.

    h, context = connection.pre(x)          # streams [..., n, d] -> [..., d]
    x = connection.post(F(h), context)      # streams [..., n, d]

From one sub-layer straight to the next, in one pass over the streams:

    h, context = following.advance(F(h), context)

`Residual` is the plain residual stream, `HC` mixes its streams freely
(arXiv 2409.19606), `MHC` by matrices of a constrained kind, doubly stochastic
ones by default (arXiv 2512.24880), and `SinglePass` is mHC with the read
weights one sub-layer early (DeepSeek-V4.1). Around them, once per model, stand
`expand` and `Collapse`, see `streams`. They accept `rngs`, as modules do, and
draw nothing from them.
"""

import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc import kernels
from mhc import mixing
from mhc import observation
from mhc import precision
from mhc.context import Context, Mappings, by_position
from mhc.kernels.xla import streams


class Residual(nnx.Module):
  """x + F(x) on a single stream; no parameters."""

  def __init__(self, *, rngs: nnx.Rngs | None = None):
    del rngs

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Reads the one stream.

    Raises:
      ValueError: there are several.
    """
    arguments.check_streams(x, 1, x.shape[-1])
    observation.record(x, None)
    return precision.mark('sublayer_input', x[..., 0, :]), Context(x, None)

  def post(
    self, y: Float[Array, '...'], context: Context
  ) -> Float[Array, '*batch 1 d']:
    arguments.check_output(y, *context)
    return precision.mark('streams', context.x + y[..., None, :])

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


HC_PARAMETERS = (
  *('gain', 'theta_pre', 'theta_post', 'theta_res', 'alpha'),
  *('bias_pre', 'bias_post', 'bias_res'),
)


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
    rngs: nnx.Rngs | None = None,
  ):
    del rngs
    arguments.check_place(dim, num_streams, index)
    functional.check_parts(pre=pre, post=post, res=res)
    initial_read = jnp.full(num_streams, 1 / num_streams, jnp.float32)
    if pre != 'off':
      initial_stream = functional.first_read(index, num_streams)
      initial_read = initial_stream.astype(jnp.float32)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    ones = functools.partial(jnp.ones, dtype=jnp.float32)
    self.gain = nnx.Param(ones(dim))
    self.theta_pre = nnx.Param(zeros(dim))
    self.theta_post = nnx.Param(zeros(dim))
    self.theta_res = nnx.Param(zeros((num_streams, dim)))
    self.alpha = nnx.Param(jnp.full(2, 0.01, jnp.float32))  # s_width, s_depth
    self.bias_pre = nnx.Param(initial_read)
    self.bias_post = nnx.Param(ones(num_streams))
    self.bias_res = nnx.Param(jnp.eye(num_streams, dtype=jnp.float32))
    self.shape = (num_streams, dim)
    self.parts = (pre, post, res)
    self.norm_eps = norm_eps
    self.implementation = implementation

  @property
  def params(self) -> dict[str, nnx.Param]:
    return {name: getattr(self, name) for name in HC_PARAMETERS}

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    return self.mappings_by(functional.float32(self.params), x)

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(square + self.norm_eps)
    normed = normed * params['gain'][None, None]
    theta = jnp.concatenate(
      [
        params['theta_pre'][None],
        params['theta_post'][None],
        params['theta_res'],
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
    width, depth = params['alpha']
    bias_pre, bias_post = params['bias_pre'], params['bias_post']
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
    return mapped._replace(res=res + params['bias_res'][..., None])

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    context = _context(self, self.parts[2] != 'off', x)
    observation.record(*context)
    return functional.read(
      x, context.mappings.pre, self.implementation
    ), context

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
      chooses the stream that the sub-layer reads first. Traced or not.
    res_diagonal: see `mixing.initial_logits`.
    init: 'authors' for the start of mHC-lite's and KromHC's code, see
      `functional.init`.
    options: fields of `functional.Options`.
  """

  def __init__(
    self,
    dim: int,
    num_streams: int,
    index,
    *,
    res_diagonal: float = 6.0,
    init: mixing.Init = 'mhc',
    rngs: nnx.Rngs | None = None,
    **options,
  ):
    del rngs
    self.options = functional.Options(**options)
    params = functional.init(
      dim,
      num_streams,
      index,
      self.options.mixing,
      pre=self.options.pre,
      res=self.options.res,
      res_diagonal=res_diagonal,
      init=init,
    )
    self.phi = nnx.Param(params['phi'])
    self.alpha = nnx.Param(params['alpha'])
    self.bias = nnx.Param(params['bias'])
    self.shape = (num_streams, dim)

  @property
  def params(self) -> functional.Params:
    return {'phi': self.phi, 'alpha': self.alpha, 'bias': self.bias}

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    return self.mappings_by(self.params, x)

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
    return functional.mappings(params, x, self.options)

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    arguments.check_streams(x, *self.shape)
    return functional.pre(self.params, x, self.options)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return functional.post(y, context, self.options.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one, in one pass."""
    arguments.check_streams(context.x, *self.shape)
    return functional.advance(self.params, y, context, self.options)


@by_position
class StreamsWithPre(NamedTuple):
  """Streams, and the H_pre by which the next sub-layer reads them."""

  x: Float[Array, '*batch n d']
  weights: Float[Array, 'n t']

  def read(
    self, implementation: kernels.Implementation | None = None
  ) -> Float[Array, '*batch d']:
    """What the next sub-layer reads, or the streams closed."""
    return functional.read(self.x, self.weights, implementation)


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
    arguments.check_place(dim, num_streams, index)
    self.next_mhc = MHC(dim, num_streams, index + 1, **options)

  def pre(
    self, state: StreamsWithPre
  ) -> tuple[Float[Array, '*batch d'], Context]:
    context = self._context(state.x)
    read_by = context.mappings._replace(pre=state.weights)
    observation.record(state.x, read_by)
    return state.read(self.next_mhc.options.implementation), context

  def _context(self, x):
    return _context(self.next_mhc, self.next_mhc.options.mixes, x)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> StreamsWithPre:
    return StreamsWithPre(self.next_mhc.post(y, context), context.mappings.pre)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


def _context(connection, mixes, x):
  """The mappings of connections that do not read in the same pass."""
  arguments.check_streams(x, *connection.shape)

  def run(params, x):
    mapped = connection.mappings_by(params, functional.tokens(x))
    return Context(x, functional.named(mapped))

  specs = lambda spec: Context(spec, functional.specs_mappings(spec, mixes))
  params = functional.float32(connection.params)
  return explicit.call(run, x, specs, params, x)
