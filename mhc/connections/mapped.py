"""The mappings of connections that do not read in the same pass."""

from mhc import arguments
from mhc import explicit
from mhc import functional
from mhc.context import Context


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
