"""Connections whose mappings come first, and then what they read."""

from flax import nnx
from jaxtyping import Array, Float

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc import observation
from mhc.context import Context, Mappings


class Mapped(nnx.Module):
  """A connection with `params`, `mappings_by`, `shape` and `implementation`."""

  mixes = False  # whether there is an H_res

  def mappings(self, x: Float[Array, 't n d']) -> Mappings:
    return self.mappings_by(functional.float32(self.params), x)

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    found = context(self, self.mixes, x)
    observation.record(*found)
    h = functional.read(x, found.mappings.pre, self.implementation)
    return h, found

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d']:
    return functional.post(y, context, self.implementation)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


def context(connection, mixes, x):
  """x and its mappings by `connection.mappings_by`; H_res is I unless it mixes.

  Raises:
    ValueError: x is not of the streams of the connection.
  """
  arguments.check_streams(x, *connection.shape)

  def run(params, x):
    mapped = connection.mappings_by(params, functional.tokens(x))
    return Context(x, functional.named(mapped))

  specs = lambda spec: Context(spec, functional.specs_mappings(spec, mixes))
  params = functional.float32(connection.params)
  return explicit.call(run, x, specs, params, x)
