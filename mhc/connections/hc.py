"""Hyper-Connections, which mix their streams freely."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import arguments
from mhc import functional
from mhc import kernels
from mhc.connections import mapped as mapped_lib
from mhc.context import Mappings
from mhc.kernels.xla import streams

HC_PARAMETERS = (
  *('gain', 'theta_pre', 'theta_post', 'theta_res', 'alpha'),
  *('bias_pre', 'bias_post', 'bias_res'),
)


class HC(mapped_lib.Mapped):
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
    self.mixes = res != 'off'
    self.norm_eps = norm_eps
    self.implementation = implementation

  @property
  def params(self) -> dict[str, nnx.Param]:
    return {name: getattr(self, name) for name in HC_PARAMETERS}

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
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
    dynamic = tanh_products(x, params['gain'], theta, self.norm_eps)
    width, depth = params['alpha']
    bias_pre, bias_post = params['bias_pre'], params['bias_post']
    if parts[0] == 'off':
      bias_pre = jnp.full_like(bias_pre, 1 / n)
    if parts[1] == 'off':
      bias_post = jnp.ones_like(bias_post)
    mapped = Mappings(
      pre=width * dynamic[0] + bias_pre[:, None],
      post=depth * dynamic[1] + bias_post[:, None],
      res=None,
    )
    if parts[2] == 'off':
      return mapped
    res = width * dynamic[2:] + params['bias_res'][..., None]
    return mapped._replace(res=res)


def tanh_products(
  x: Float[Array, 't n d'],
  gain: Float[Array, 'd'],
  theta: Float[Array, 'k d'],
  norm_eps: float,
) -> Float[Array, 'k n t']:
  """tanh(theta_k . x~_j), x~_j the RMS norm of stream j with a gain."""
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(square + norm_eps) * gain[None, None]
  return jnp.tanh(
    jnp.einsum('tjd,kd->kjt', normed, theta, precision=streams.HIGHEST)
  )
