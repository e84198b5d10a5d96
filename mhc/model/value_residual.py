"""The value residual: every block attends to the first block's values as well.

    v_l <- v_l + a_l v_1,   l > 1

with one learned number a_l a block (ResFormer, arXiv 2410.17897; its weight of
v_l is a scale of the block's own matrix). a_l starts at 0, so that the network
starts as the one without.

The values of the first block travel beside the streams, from block to block and
from stage to stage of a pipeline: g v numbers a token, of g heads.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mhc import config as config_lib
from mhc.model import residual


class FirstValues(NamedTuple):
  """The values of the first block; zeros until it has run."""

  values: Float[Array, 'b t g v']
  are_there: Float[Array, '']  # 1, or 0 until then


class WithValues(NamedTuple):
  """The state of a model with value residuals, between its blocks."""

  streams: residual.ResidualState
  first: FirstValues


State = residual.ResidualState | WithValues


class ValueResidual(nnx.Module):
  """Values [b, t, g, v] of a block -> those that it attends to."""

  def __init__(self):
    self.gain = nnx.Param(jnp.zeros(1, jnp.float32))

  def __call__(
    self, values: Float[Array, 'b t g v'], first: FirstValues
  ) -> tuple[Float[Array, 'b t g v'], FirstValues]:
    """Also returns what the next block takes."""
    gain = self.gain[...].astype(values.dtype).reshape(1, 1, 1, 1)
    kept = jnp.where(first.are_there > 0, first.values, values)
    there = FirstValues(kept, jnp.ones_like(first.are_there))
    return values + gain * first.values, there


def make(config: config_lib.AttentionConfig) -> ValueResidual | None:
  return ValueResidual() if config.value_residual else None


def opened(
  config: config_lib.AttentionConfig,
  streams: residual.ResidualState,
  x: Float[Array, 's d'],
  batch: tuple[int, int],
) -> State:
  """The state before the first block, of embeddings x of `batch` tokens."""
  if not config.value_residual:
    return streams
  # Zeros that vary, inside a shard_map, over devices as x does.
  zeros = 0 * x[:, :1].reshape(*batch, 1, 1)
  shape = config.num_value_heads, config.head_dim
  values = jnp.broadcast_to(zeros, (*batch, *shape))
  return WithValues(streams, FirstValues(values, 0 * x[0, 0].astype('float32')))


def split(state: State) -> tuple[residual.ResidualState, FirstValues | None]:
  """The streams, and what travels beside them."""
  return state if isinstance(state, WithValues) else (state, None)


def joined(
  streams: residual.ResidualState,
  first: FirstValues | None,
  before: FirstValues | None,
  is_real: Bool[Array, ''] | None = None,
) -> State:
  """The state that a block returns, `before` behind one that is not real."""
  if first is None:
    return streams
  if is_real is not None:
    first = jax.tree.map(lambda a, b: jnp.where(is_real, a, b), first, before)
  return WithValues(streams, first)


def on_streams(
  function: Callable[[residual.ResidualState], residual.ResidualState],
  state: State,
) -> State:
  """A function of the streams alone."""
  streams, first = split(state)
  return joined(function(streams), first, first)
