"""mHC that reads the streams where it writes them."""

from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from mhc import arguments
from mhc import functional
from mhc import kernels
from mhc import observation
from mhc.connections import mapped
from mhc.connections.mhc import MHC
from mhc.context import Context, by_position


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
    return mapped.context(self.next_mhc, self.next_mhc.options.mixes, x)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> StreamsWithPre:
    return StreamsWithPre(self.next_mhc.post(y, context), context.mappings.pre)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))
