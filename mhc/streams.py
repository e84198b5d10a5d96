"""Open and close the n residual streams of a model, [..., n, d].

`expand`, or an `Expand`, opens them once, before the first sub-layer, and
`Collapse` closes them once, after the last. Doing either in every block would
turn a connection into n parallel plain residuals.
"""

from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc.kernels.xla import streams


def expand(
  x: Float[Array, '*batch d'],
  num_streams: int,
  scale: Literal['ones', 'random'] = 'ones',
) -> Float[Array, '*batch n d']:
  """Opens the streams: `num_streams` copies of x.

  With scale='random' they are no copies: each number of each stream is
  multiplied by a constant 1 + 0.1 N(0, 1). Those [n, d] constants are one draw
  of a fixed key, the same in every model of that shape and for every seed, and
  no parameter. Connections that all streams enter alike (pre='off') need it.
  """
  if scale not in ('ones', 'random'):
    raise ValueError(f"scale must be 'ones' or 'random', got {scale!r}")
  arguments.check_place(x.shape[-1], num_streams, 0)
  shape = (*x.shape[:-1], num_streams, x.shape[-1])
  wide = jnp.broadcast_to(x[..., None, :], shape)
  if scale == 'ones':
    return wide
  # Of one generator, whatever JAX's default is: a run goes on anywhere.
  key = jax.random.key(0, impl='threefry2x32')
  factors = 1 + 0.1 * jax.random.normal(key, shape[-2:], jnp.float32)
  factors = factors.reshape(*(1,) * (wide.ndim - 2), *factors.shape)
  return (wide.astype(jnp.float32) * factors).astype(x.dtype)


class Expand(nnx.Module):
  """Opens the streams with a learned scale of each one, once per model.

      x_j = scale_j * x,   scale [n, d]

  (per-stream scales against stream collapse, arXiv 2606.03483). They start at
  1, so that the streams are copies and the network the plain one; the paper
  starts them lower, near 0.6. n d parameters.
  """

  def __init__(
    self, dim: int, num_streams: int, *, rngs: nnx.Rngs | None = None
  ):
    del rngs
    arguments.check_place(dim, num_streams, 0)
    self.scale = nnx.Param(jnp.ones((num_streams, dim), jnp.float32))

  def __call__(self, x: Float[Array, '*batch d']) -> Float[Array, '*batch n d']:
    """Opens the streams, in the dtype of x."""
    wide = expand(x, len(self.scale[...]))
    scale = self.scale[...].reshape(*(1,) * (x.ndim - 1), *self.scale.shape)
    return (wide.astype(jnp.float32) * scale).astype(x.dtype)


class Collapse(nnx.Module):
  r"""Closes the streams, [..., n, d] -> [..., d], once per model.

  `'sum'` (the HC paper) and `'mean'` have no parameters. `'learned'` is
  DeepSeek-V4's head: sum_j (sigmoid(alpha raw_j / r + bias_j) + 1e-6) x_j with
  raw = x phi and r as in `MHC`; nd n + n + 1 parameters, phi = 0, alpha = 0.01,
  bias = 0 at the start. The final norm of a transformer makes all three the
  same function of equal streams.
  """

  def __init__(
    self,
    kind: Literal['sum', 'mean', 'learned'],
    dim: int,
    num_streams: int,
    *,
    norm_eps: float = 1e-20,
    rngs: nnx.Rngs | None = None,
  ):
    del rngs
    arguments.check_place(dim, num_streams, 0)
    if kind not in ('sum', 'mean', 'learned'):
      raise ValueError(
        f"collapse must be 'sum', 'mean' or 'learned', got {kind!r}"
      )
    self.kind = kind
    self.shape = (num_streams, dim)
    self.norm_eps = norm_eps
    if kind == 'learned':
      zeros = jnp.zeros((num_streams * dim, num_streams), jnp.float32)
      self.phi = nnx.Param(zeros)
      self.alpha = nnx.Param(jnp.full(1, 0.01, jnp.float32))
      self.bias = nnx.Param(jnp.zeros(num_streams, jnp.float32))

  def __call__(self, x: Float[Array, '*batch n d']) -> Float[Array, '*batch d']:
    """Closes the streams.

    Raises:
      ValueError: x is not of as many streams of this width.
    """
    arguments.check_streams(x, *self.shape)
    match self.kind:
      case 'sum':
        return jnp.sum(x, axis=-2)
      case 'mean':
        return jnp.mean(x, axis=-2)
      case 'learned':
        params = {'phi': self.phi, 'alpha': self.alpha, 'bias': self.bias}
        params = functional.float32(params)
        return explicit.call(self._weighted, x, functional.spec_read, params, x)

  def _weighted(self, params, x):
    tokens = functional.tokens(x)
    raw = streams.normed_projection(tokens, params['phi'], self.norm_eps)
    logits = raw * params['alpha'][None] + params['bias'][None]
    weights = jax.nn.sigmoid(logits) + 1e-6
    h = streams.read(tokens, weights.T)
    return h.reshape(*x.shape[:-2], x.shape[-1])
