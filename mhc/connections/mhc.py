"""Manifold-constrained Hyper-Connections."""

from flax import nnx
from jaxtyping import Array, Float

from mhc import arguments
from mhc import functional
from mhc import mixing
from mhc.context import Context, Mappings


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
      go_size=self.options.go_size,
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
