"""The wide residual: one stream n times as wide, to control for memory."""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc import observation
from mhc import precision
from mhc.context import Context


class WideResidual(nnx.Module):
  r"""A plain residual of width n d around a sub-layer of width d.

      h = x D,   x <- x + F(h) U        x [n d],  D [n d, d],  U [d, n d]

  It holds what n streams hold, and mixes nothing by itself: what a connection
  of n streams gains over it is not gained by their memory (virtual width,
  arXiv 2511.11238, with maps of its own around each sub-layer).

  x starts as n copies of the embedding. D starts as I at the stream that the
  sub-layer would read first, 0 elsewhere, and U as n times I, side by side: the
  network is the plain one, and the copies do not stay equal. 2 n d^2
  parameters, as many FLOPs a token as the sub-layer's own maps of that size.
  """

  def __init__(
    self, dim: int, num_streams: int, index, *, rngs: nnx.Rngs | None = None
  ):
    del rngs
    arguments.check_place(dim, num_streams, index)
    eye = jnp.eye(dim, dtype=jnp.float32)
    first = functional.first_read(index, num_streams).astype(jnp.float32)
    self.down = nnx.Param((first[:, None, None] * eye[None]).reshape(-1, dim))
    self.up = nnx.Param(jnp.tile(eye, (1, num_streams)))
    self.shape = (num_streams, dim)

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """x D, and the context.

    Raises:
      ValueError: x is not of as many streams of this width.
    """
    arguments.check_streams(x, *self.shape)

    def run(down, x):
      wide = x.reshape(*x.shape[:-2], -1)
      return jnp.einsum('...w,wd->...d', wide, down.astype(x.dtype))

    h = explicit.call(run, x, functional.spec_read, self.down[...], x)
    observation.record(x, None)
    return precision.mark('sublayer_input', h), Context(x, None)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    """x + y U.

    Raises:
      ValueError: y is not what a sub-layer returns that has read `context`.
    """
    arguments.check_output(y, *context)

    def run(up, y, x):
      added = jnp.einsum('...d,dw->...w', y, up.astype(y.dtype))
      return x + added.reshape(x.shape)

    x = explicit.call(
      run, context.x, lambda spec: spec, self.up[...], y, context.x
    )
    return precision.mark('streams', x)
