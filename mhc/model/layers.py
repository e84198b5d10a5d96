"""The small layers: linear maps, norm, embedding, gated feed-forward.

Parameters are float32 and are cast to the activations' dtype where they are
used; norm statistics are float32. Matrices start as N(0, 1/fan_in), so a unit
input gives a unit output. A bias is of queries, keys and values alone, where
the settings ask for it.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from mhc.model import parts
from mhc.model import recompute


class Linear(nnx.Module):
  """x W; with an adapter x (W + A B), with a bias + b. B and b start as 0."""

  def __init__(
    self,
    in_dim: int,
    out_dim: int,
    *,
    bias: bool = False,
    adapter_rank: int = 0,
    rngs: nnx.Rngs,
  ):
    weight = jax.random.normal(rngs.params(), (in_dim, out_dim), jnp.float32)
    self.weight = nnx.Param(weight * in_dim**-0.5)
    self.bias = nnx.Param(jnp.zeros(out_dim, jnp.float32)) if bias else None
    if not adapter_rank:
      self.adapter_in = self.adapter_out = None
      return
    shape = in_dim, adapter_rank
    narrow = jax.random.normal(rngs.params(), shape, jnp.float32)
    self.adapter_in = nnx.Param(narrow * in_dim**-0.5)
    self.adapter_out = nnx.Param(
      jnp.zeros((adapter_rank, out_dim), jnp.float32)
    )

  def matrix(self, dtype) -> Float[Array, 'i o']:
    """W, or W + A B."""
    weight = self.weight[...]
    if self.adapter_in is not None:
      weight = weight + self.adapter_in[...] @ self.adapter_out[...]
    return weight.astype(dtype)

  def __call__(self, x: Float[Array, '*b i']) -> Float[Array, '*b o']:
    y = x @ self.weight[...].astype(x.dtype)
    if self.adapter_in is not None:
      low = x @ self.adapter_in[...].astype(x.dtype)
      y = y + low @ self.adapter_out[...].astype(x.dtype)
    if self.bias is None:
      return y
    bias = jnp.expand_dims(self.bias[...], range(y.ndim - 1))
    return y + bias.astype(x.dtype)


def merged(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters with W + A B in the place of every W with an adapter."""
  if 'adapter_in' in tree:
    low = np.matmul(tree['adapter_in'], tree['adapter_out'])
    rest = {name: leaf for name, leaf in tree.items() if name == 'bias'}
    return {'weight': np.asarray(tree['weight']) + low} | rest
  return {
    name: merged(leaf) if isinstance(leaf, Mapping) else leaf
    for name, leaf in tree.items()
  }


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * gain over the last dimension."""

  def __init__(self, dim: int, eps: float):
    self.gain = nnx.Param(jnp.ones(dim, jnp.float32))
    self.eps = eps

  def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
    return _rms_norm(x, self.gain[...], self.eps)


class Embed(nnx.Module):
  """Rows of a table, N(0, 1) at the start; tied to the logits N(0, 1/d).

  Tokens below 0 stand for ~token: they are read, and not predicted.
  """

  def __init__(
    self, vocab_size: int, dim: int, *, tied: bool = False, rngs: nnx.Rngs
  ):
    table = jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
    self.table = nnx.Param(table * dim**-0.5 if tied else table)

  def __call__(self, tokens: Int[Array, '*b'], dtype) -> Float[Array, '*b d']:
    tokens = jnp.where(tokens < 0, ~tokens, tokens)
    return self.table[...].astype(dtype)[tokens]


class SwiGLU(nnx.Module):
  """(silu(x W_gate) * x W_up) W_down."""

  def __init__(
    self, dim: int, hidden_dim: int, *, adapter_rank: int = 0, rngs: nnx.Rngs
  ):
    rank = adapter_rank
    self.gate = Linear(dim, hidden_dim, adapter_rank=rank, rngs=rngs)
    self.up = Linear(dim, hidden_dim, adapter_rank=rank, rngs=rngs)
    self.down = Linear(hidden_dim, dim, adapter_rank=rank, rngs=rngs)

  def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
    gate, up = (
      recompute.name_inner(self.gate(x)),
      recompute.name_inner(self.up(x)),
    )
    return self.down(swiglu(gate, up))


@jax.custom_vjp
def logits(
  x: Float[Array, 's d'], weight: Float[Array, 'd v']
) -> Float[Array, 's v']:
  """x W as float32 sums that are never rounded to the dtype of x.

  The gradient's products take the cotangent in the dtype of x, as those of
  `Linear` do, at whose speed they then run.
  """
  wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
  return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=wide)


def _logits_forward(x, weight):
  return logits(x, weight), (x, weight)


@parts.part(parts.HEAD)
def _logits_backward(kept, g):
  x, weight = kept
  g = g.astype(x.dtype)
  return g @ weight.astype(x.dtype).T, (x.T @ g).astype(weight.dtype)


logits.defvjp(_logits_forward, _logits_backward)


@recompute.checkpoint_cheap
def swiglu(
  gate: Float[Array, '*b f'], up: Float[Array, '*b f']
) -> Float[Array, '*b f']:
  """silu(gate) * up; the gradient keeps gate and up only."""
  return jax.nn.silu(gate) * up


@functools.partial(recompute.checkpoint_cheap, static_argnums=2)
def _rms_norm(x, gain, eps):
  """The gradient keeps x only, in its own dtype."""
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(square + eps)
  gain = jnp.expand_dims(gain, range(x.ndim - 1))
  return (normed * gain).astype(x.dtype)
