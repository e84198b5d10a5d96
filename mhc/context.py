"""What travels from `pre` to `post` of a connection."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


def by_position(cls):
  """Registers a tuple's fields by number, as `nnx.tabulate` takes them."""

  def flatten(values):
    keys = map(jax.tree_util.SequenceKey, range(len(values)))
    return tuple(zip(keys, values, strict=True)), None

  jax.tree_util.register_pytree_with_keys(
    cls, flatten, lambda _, values: cls(*values), lambda v: (tuple(v), None)
  )
  return cls


@by_position
class Mappings(NamedTuple):
  """The three mappings of t tokens, float32; `res=None` stands for I."""

  pre: Float[Array, 'n t']
  post: Float[Array, 'n t']
  res: Float[Array, 'n n t'] | None


@by_position
class Context(NamedTuple):
  """The streams and their mappings: from `pre` to `post`."""

  x: Float[Array, '*batch n d']
  mappings: Mappings | None
