"""What the connections of any model do to its streams, on a batch of inputs.

`observe` calls a model and collects at every sub-layer what a probe of the
trainer collects. The connections report themselves by `record`: nothing in the
model has to change, and its own jit, scan and remat stay.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mhc import gains

# A part of the key of jit's caches, so that a compiled model is traced again.
_observer = jax.make_user_context(None)


class StreamStats(NamedTuple):
  """What is read of t tokens at a sub-layer; float32."""

  res: Float[Array, '*sublayers t n n']  # H_res, I where the kind has none
  pre: Float[Array, '*sublayers t n']  # H_pre that it reads by; 1 without
  post: Float[Array, '*sublayers t n']  # H_post; 1 without
  # Mean over pairs of streams; 1 for n = 1.
  cosine: Float[Array, '*sublayers t']
  rms: Float[Array, '*sublayers t']  # of the n d numbers of the streams


@dataclasses.dataclass(frozen=True)
class Observation:
  """The sub-layers of a model, in the order in which they ran.

  Attributes:
    stats: `StreamStats` of every sub-layer and the observed tokens, NumPy.
    profile: `gains.profile` of their H_res, NumPy: gains, composites, residuals
      and what is left of the streams' differences, [l] each.
    cosine, rms, streams_read: means over tokens, [l].
  """

  stats: StreamStats
  profile: Mapping[str, np.ndarray]
  cosine: np.ndarray
  rms: np.ndarray
  streams_read: np.ndarray

  @property
  def half_life(self) -> float:
    """Number of sub-layers in which the streams' differences halve."""
    return gains.half_life(self.profile['sigma_diff_fwd'])

  def __str__(self) -> str:
    columns = {
      'gain fwd': self.profile['gain_fwd'],
      'gain bwd': self.profile['gain_bwd'],
      'composite fwd': self.profile['composite_fwd'],
      'composite bwd': self.profile['composite_bwd'],
      'differences kept': self.profile['sigma_diff_fwd'],
      'cosine': self.cosine,
      'streams read': self.streams_read,
      'rms': self.rms,
    }
    lines = ['sub-layer  ' + '  '.join(columns)]
    for layer, row in enumerate(zip(*columns.values(), strict=True)):
      numbers = [
        f'{value:>{len(name)}.4g}'
        for name, value in zip(columns, row, strict=True)
      ]
      lines.append(f'{layer:>9}  ' + '  '.join(numbers))
    return '\n'.join(lines)


def observe(
  model: Callable, *inputs, max_tokens: int = 1024, **keywords
) -> Observation:
  """Calls `model(*inputs, **keywords)` and returns what its connections did.

  Args:
    model: any callable that passes through connections of `mhc`, of Flax or of
      `mhc.functional`: nothing is compiled into it for later calls. Its jit,
      scan, remat and (on newer JAX) vmap may stay; it must run on one device.
    max_tokens: of each sub-layer, the first so many are kept.

  Raises:
    ValueError: it passes through none, or through connections of several
      numbers of streams or tokens, whose products mean nothing.
  """
  observer = _Observer(max_tokens)
  with _observer(observer):
    jax.block_until_ready(model(*inputs, **keywords))
    jax.effects_barrier()
  found = observer.found
  if not found:
    raise ValueError(
      'the model has passed through no connection of mhc: call it on inputs '
      'that reach one'
    )
  shapes = {stats.res.shape for stats in found}
  if len(shapes) > 1:
    raise ValueError(
      'sub-layers of several numbers of tokens or streams, H_res of shapes '
      f'{sorted(shapes)}: observe one stack of them at a time'
    )
  stats = StreamStats(*map(np.stack, zip(*found, strict=True)))
  profile, read = jax.device_get(_summary(stats.res, stats.pre))
  return Observation(
    stats, profile, stats.cosine.mean(1), stats.rms.mean(1), read.mean(1)
  )


@jax.jit
def _summary(res, pre):
  return gains.profile(res), gains.streams_read(pre)


def record(x: Float[Array, '*batch n d'], mappings: Any):
  """Reports a sub-layer to `observe`, if that is at work; else does nothing.

  To be called by a connection of one's own, in `pre` and `advance`.

  Args:
    x: the streams that enter the sub-layer.
    mappings: a `functional.Mappings` with the H_pre that it reads by; None for
      a plain residual.
  """
  observer = _observer.value
  if observer is None:
    return
  stats = stream_stats(x, mappings)
  observer.take(*(each[: observer.max_tokens] for each in stats))


@jax.jit
def stream_stats(x: Float[Array, '*batch n d'], mappings: Any) -> StreamStats:
  """The statistics of a sub-layer: of its mappings and of what enters it.

  The arguments are those of `record`.
  """
  n = x.shape[-2]
  t = x.size // (n * x.shape[-1])
  x = x.reshape(t, *x.shape[-2:]).astype(jnp.float32)
  res = jnp.broadcast_to(jnp.eye(n, dtype=jnp.float32), (t, n, n))
  pre = post = jnp.ones((t, n), jnp.float32)
  if mappings is not None:
    pre, post = mappings.pre.T, mappings.post.T
    if mappings.res is not None:
      res = jnp.moveaxis(mappings.res, -1, 0)
  power = jnp.sum(x * x, axis=-1)
  unit = x * jax.lax.rsqrt(power + jnp.finfo(jnp.float32).tiny)[..., None]
  total = jnp.sum(unit, axis=1)
  pairs = max(1, n * (n - 1))
  cosine = (jnp.sum(total * total, axis=-1) - n) / pairs + float(n == 1)
  rms = jnp.sqrt(jnp.mean(power, axis=-1) / x.shape[-1])
  return StreamStats(res, pre, post, cosine, rms)


class _Observer:
  """Collects statistics in the order in which sub-layers run."""

  def __init__(self, max_tokens):
    self.max_tokens = max_tokens
    self.found: list[StreamStats] = []

    def plain(*stats):
      io_callback(self._keep, None, *stats, ordered=True)
      return ()

    # Batches of vmap are tokens.
    take = jax.custom_batching.custom_vmap(plain)

    @take.def_vmap
    def _(size, batched, *stats):
      take(
        *(
          each.reshape(-1, *each.shape[2:]) if is_batched else each
          for each, is_batched in zip(stats, batched, strict=True)
        )
      )
      return (), ()

    # Older JAX would drop a call without results: there vmap is an error.
    has_effects = jax.make_jaxpr(take)(np.zeros(1, np.float32)).effects
    self.take = take if has_effects else plain

  def _keep(self, *stats):
    self.found.append(StreamStats(*map(np.asarray, stats)))
