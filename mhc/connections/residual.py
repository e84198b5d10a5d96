"""The plain residual stream."""

from flax import nnx
from jaxtyping import Array, Float

from mhc import arguments
from mhc import observation
from mhc import precision
from mhc.context import Context


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
