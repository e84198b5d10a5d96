"""A sub-layer of any model with its norm and its connection as one module."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float


class Sublayer(nnx.Module):
  """x -> post(F(norm(pre(x)))): what `wrap` makes."""

  def __init__(
    self, sublayer: Callable, connection: Any, norm: Callable | None = None
  ):
    self.sublayer = sublayer
    self.connection = connection
    self.norm = norm

  def __call__(self, x: Float[Array, '*batch n d'], *arguments, **keywords):
    """Streams to streams; other arguments are the sub-layer's.

    Returns:
      the streams or, if the sub-layer returns a tuple, a tuple with the streams
      in place of its first element.
    """
    h, context = self.connection.pre(x)
    if self.norm is not None:
      h = self.norm(h)
    y = self.sublayer(h, *arguments, **keywords)
    if not isinstance(y, tuple):
      return self.connection.post(y, context)
    return self.connection.post(y[0], context), *y[1:]


def wrap(
  sublayer: Callable, connection: Any, *, norm: Callable | None
) -> Sublayer:
  """Puts a connection around a sub-layer, and a norm directly before it.

      block = mhc.wrap(
        nnx.Linear(64, 64, rngs=rngs),
        mhc.MHC(64, num_streams=4, index=0),
        norm=nnx.RMSNorm(64, rngs=rngs),
      )
      x = block(x)  # [..., 4, 64] -> [..., 4, 64]

  Args:
    sublayer: [..., d] and any further arguments -> [..., d], or a tuple that
      begins with it; without a residual of its own.
    connection: an `mhc.MHC`, or anything with `pre` and `post`.
    norm: of what the sub-layer reads. None if the sub-layer begins with one;
      with none at all the network does not start as the plain residual one.

  Raises:
    TypeError: an argument is not what it has to be.
  """
  if not (hasattr(connection, 'pre') and hasattr(connection, 'post')):
    raise TypeError(
      f'wrap needs a connection with pre and post, got {type(connection)}: '
      'give e.g. mhc.MHC(dim, num_streams, index)'
    )
  for name, each in (('sublayer', sublayer), ('norm', norm)):
    if not callable(each) and (name, each) != ('norm', None):
      raise TypeError(f'wrap needs a {name} that can be called, got {each!r}')
  return Sublayer(sublayer, connection, norm)
