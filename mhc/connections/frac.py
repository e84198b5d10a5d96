"""Frac-Connections: fractions of one stream in place of copies of it."""

from flax import nnx
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc import observation
from mhc import precision
from mhc.connections import hc
from mhc.context import Context, Mappings
from mhc.kernels.xla import streams


class Frac(nnx.Module):
  r"""Dynamic Frac-Connections (arXiv 2503.14125), Hyper-Connections of d / m.

  One stream x [..., 1, d] is m fractions x_j of d / m numbers. With x~_j those,
  each RMS-normalised with a learned gain,

      h_i  = sum_j H_pre_ij x_j,   h = (h_1, ..., h_m)
      x_i <- sum_j H_res_ij x_j + H_post_i F(h)_i

      H_pre_ij = s_width tanh(theta_pre_i . x~_j) + b_pre_ij       [m, m]
      H_res_ij = s_width tanh(theta_res_i . x~_j) + b_res_ij       [m, m]
      H_post_i = s_depth tanh(theta_post . x~_i) + b_post_i        [m]

  They start as the plain residual: theta = 0, scales 0.01, b_pre = b_res = I,
  b_post = 1. d/m (2 m + 2) + 2 m^2 + m + 2 parameters; a token holds d numbers,
  as many as of a plain residual. Probes see as H_pre the mean of its rows.
  """

  def __init__(
    self,
    dim: int,
    num_fractions: int,
    index,
    *,
    norm_eps: float = 1e-20,
    rngs: nnx.Rngs | None = None,
  ):
    """`index` chooses nothing: all fractions are read.

    Raises:
      ValueError: the fractions do not divide `dim`.
    """
    del rngs
    arguments.check_place(dim, num_fractions, index)
    if dim % num_fractions:
      raise ValueError(
        f'{num_fractions} fractions do not divide dim={dim}: take a number '
        'that does'
      )
    m, width = num_fractions, dim // num_fractions
    zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.float32))
    self.gain = nnx.Param(jnp.ones(width, jnp.float32))
    self.theta_pre, self.theta_res = zeros(m, width), zeros(m, width)
    self.theta_post = zeros(width)
    self.alpha = nnx.Param(jnp.full(2, 0.01, jnp.float32))  # s_width, s_depth
    self.bias_pre = nnx.Param(jnp.eye(m, dtype=jnp.float32))
    self.bias_res = nnx.Param(jnp.eye(m, dtype=jnp.float32))
    self.bias_post = nnx.Param(jnp.ones(m, jnp.float32))
    self.dim, self.num_fractions, self.norm_eps = dim, m, norm_eps

  @property
  def params(self) -> dict[str, nnx.Param]:
    names = ('gain', 'theta_pre', 'theta_res', 'theta_post', 'alpha')
    names += ('bias_pre', 'bias_res', 'bias_post')
    return {name: getattr(self, name) for name in names}

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """What the sub-layer reads, and the context, whose streams are fractions.

    Raises:
      ValueError: x is not one stream of this width.
    """
    arguments.check_streams(x, 1, self.dim)

    def run(params, x):
      parts = x.reshape(*x.shape[:-2], self.num_fractions, -1)
      tokens = functional.tokens(parts)
      read, mappings = self._mappings(params, tokens)
      h = _mixed(read, tokens).reshape(*x.shape[:-2], self.dim)
      return h, Context(parts, functional.named(mappings))

    def specs(spec):
      parts = PartitionSpec(*spec[:-2], None, None)
      mapped = functional.specs_mappings(spec, True)
      return functional.spec_read(spec), Context(parts, mapped)

    params = functional.float32(self.params)
    h, context = explicit.call(run, x, specs, params, x)
    observation.record(*context)
    return precision.mark('sublayer_input', h), context

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch 1 d']:
    """H_res x + H_post F(h), fraction by fraction.

    Raises:
      ValueError: y is not what a sub-layer returns that has read `context`.
    """
    parts = context.x
    arguments.check_output(y, parts.reshape(*y.shape[:-1], 1, -1), None)

    def run(y, parts, mappings):
      tokens = functional.tokens(parts)
      added = y.reshape(tokens.shape).astype(jnp.float32)
      added = mappings.post.T[..., None] * added
      x = _mixed(mappings.res, tokens) + added.astype(y.dtype)
      return x.reshape(*y.shape[:-1], 1, y.shape[-1])

    specs = lambda spec: PartitionSpec(*spec[:-1], None, spec[-1])
    x = explicit.call(run, y, specs, y, *context)
    return precision.mark('streams', x)

  def _mappings(self, params, parts):
    """H_pre [m, m, t], and the mappings of `post`."""
    m = self.num_fractions
    theta = [params['theta_pre'], params['theta_res']]
    theta = jnp.concatenate([*theta, params['theta_post'][None]])
    dynamic = hc.tanh_products(parts, params['gain'], theta, self.norm_eps)
    width, depth = params['alpha']
    pre = width * dynamic[:m] + params['bias_pre'][..., None]
    res = width * dynamic[m:-1] + params['bias_res'][..., None]
    post = depth * dynamic[-1] + params['bias_post'][:, None]
    return pre, Mappings(jnp.mean(pre, axis=0), post, res)


def _mixed(matrix, parts):
  """sum_j matrix_ij x_j of every token: [m, m, t], [t, m, e] -> [t, m, e]."""
  return jnp.stack([streams.read(parts, row) for row in matrix], axis=1)
