r"""Residual connections over n streams, one interface for every kind.

A connection wraps one sub-layer F (attention or FFN, each has its own):

    h, context = connection.pre(x)        h = H_pre x
    x = connection.post(F(h), context)    x <- H_res x + H_post^T F(h)

(mHC, arXiv 2512.24880, Eq. 3) with the streams x in [..., n, d]. From one
sub-layer straight to the next, in one pass over the streams:

    h, context = following.advance(F(h), context)

The kinds differ in the mappings, the last also in what it reads:

    residual         n = 1, all mappings 1: the plain residual stream
    hc               unconstrained mappings (HC, arXiv 2409.19606)
    mhc              H_res projected onto the doubly stochastic matrices
    identity         mhc's H_pre and H_post with H_res = I
    mhc_lite         H_res a mixture of permutations (arXiv 2601.05732)
    kromhc           H_res a Kronecker product of 2 x 2 (arXiv 2601.21579)
    orthogonal       H_res a Cayley rotation (arXiv 2602.18308)
    mhc_single_pass  mhc with H_pre one sub-layer early (DeepSeek-V4.1)

Around them, once per model, stand `open_streams` and `close_streams`. Between
blocks a model carries what `leave` returns and `enter` takes: the streams, or
for kernels that write and read in one pass a `Sublayer`, whose output is still
to be written back. Plain JAX gains nothing by that pass and would keep the
streams twice for the backward pass.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mhc import config as config_lib
from mhc import precision
from mhc import streams
from mhc.hyper import HC
from mhc.hyper import MHC
from mhc.hyper import Ahead
from mhc.hyper import Context
from mhc.hyper import Mappings
from mhc.hyper import SinglePass
from mhc.hyper import Sublayer
from mhc.kernels import api


class Residual(nnx.Module):
  """x + F(x) on a single stream; no parameters."""

  def pre(
    self, x: Float[Array, '*batch 1 d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return precision.mark('sublayer_input', x[..., 0, :]), Context(x, None)

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch 1 d']:
    return precision.mark('streams', context.x + y[..., None, :])

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    """Leaves the sub-layer of `context` and enters this one."""
    return self.pre(self.post(y, context))


class Site(NamedTuple):
  """What a probe reads of t tokens at a sub-layer; float32."""

  res: Float[Array, '*sites t n n']  # H_res, I where the kind has none
  cosine: Float[Array, '*sites t']  # mean over pairs of streams; 1 for n = 1
  rms: Float[Array, '*sites t']  # of the n d numbers of the streams


Connection = Residual | HC | MHC | SinglePass
State = Float[Array, '*batch n d'] | Ahead | Sublayer


def make(
  config: config_lib.ConnectionConfig, dim: int, index, norm_eps: float
) -> Connection:
  """The connection of sub-layer `index` (attention and FFN counted apart)."""
  shape = (dim, config.streams, index)
  implementation = _implementation(config)
  options = dict(
    sinkhorn_iters=config.sinkhorn_iters,
    sinkhorn_eps=config.sinkhorn_eps,
    sinkhorn_backward=config.sinkhorn_backward,
    norm_eps=norm_eps,
    implementation=implementation,
  )
  match config.kind:
    case 'residual':
      return Residual()
    case 'hc':
      return HC(*shape, norm_eps=norm_eps, implementation=implementation)
    case 'mhc':
      return MHC(*shape, **options)
    case 'identity':
      return MHC(*shape, **options, mixing='identity')
    case 'mhc_lite':
      return MHC(*shape, **options, mixing='permutations')
    case 'kromhc':
      return MHC(*shape, **options, mixing='kronecker')
    case 'orthogonal':
      return MHC(*shape, **options, mixing='cayley')
    case 'mhc_single_pass':
      return SinglePass(*shape, **options)


def open_streams(
  config: config_lib.ConnectionConfig, x: Float[Array, '*batch d']
) -> State:
  """What the first connection enters by: x on every stream."""
  n = config.streams
  # Made from x so that, inside a shard_map, it varies over devices as x does.
  zeros = 0 * x.reshape(-1, x.shape[-1])[:, 0].astype(jnp.float32)
  if _carries_output(config):
    res = None
    if config.kind != 'identity':
      res = jnp.eye(n)[..., None] + zeros[None, None]
    ones = jnp.ones((n, 1)) + zeros[None]
    empty = precision.mark('streams', streams.expand(0 * x, n))
    return Sublayer(x, Context(empty, Mappings(ones, ones, res)))
  wide = precision.mark('streams', streams.expand(x, n))
  if config.kind != 'mhc_single_pass':
    return wide
  first = jnp.arange(n) == 0
  return Ahead(wide, first.astype(jnp.float32)[:, None] + zeros[None])


def land(config: config_lib.ConnectionConfig, state: State) -> State:
  """The state with every output written back: what leaves a pipeline stage."""
  if not isinstance(state, Sublayer):
    return state
  x = state.context.x
  return api.post(*_unwritten(config, state)).reshape(x.shape)


def take_off(config: config_lib.ConnectionConfig, state: State) -> State:
  """What `land` returned, as the first block of the next stage carries it."""
  if not _carries_output(config):
    return state
  nothing = open_streams(config, 0 * state[..., 0, :])
  return nothing._replace(context=nothing.context._replace(x=state))


def enter(
  connection: Connection, state: State
) -> tuple[Float[Array, '*batch d'], Context]:
  """What the first sub-layer of a block reads, from what the last one left."""
  if isinstance(state, Sublayer):
    return connection.advance(*state)
  return connection.pre(state)


def leave(
  config: config_lib.ConnectionConfig,
  connection: Connection,
  y: Float[Array, '*batch d'],
  context: Context,
) -> State:
  """What a block hands on after its last sub-layer has returned y."""
  if _carries_output(config):
    return Sublayer(y, context)
  return connection.post(y, context)


def masked(
  context: Context, active: Bool[Array, ''] | None, before: State | Context
) -> Context:
  """The context of a sub-layer that, if not active, changes nothing.

  H_res = I and H_post = 0; what a later sub-layer reads by is as it was
  `before`, in the state or the context that the sub-layer came from.
  """
  mappings = context.mappings
  if active is None or mappings is None:
    return context
  res, pre = mappings.res, mappings.pre
  if res is not None:
    res = jnp.where(active, res, jnp.eye(len(res))[..., None])
  if isinstance(before, Ahead):
    pre = jnp.where(active, pre, before.weights)
  elif isinstance(before, Context):
    pre = jnp.where(active, pre, before.mappings.pre)
  post = jnp.where(active, mappings.post, 0)
  return context._replace(mappings=Mappings(pre, post, res))


def silenced(
  y: Float[Array, '*batch d'], context: Context, active: Bool[Array, ''] | None
) -> Float[Array, '*batch d']:
  """A sub-layer's output, 0 if it is not active and has no H_post for that."""
  if active is None or context.mappings is not None:
    return y
  return jnp.where(active, y, 0)


def close_streams(
  config: config_lib.ConnectionConfig,
  state: State,
  collapse: streams.Collapse,
) -> Float[Array, '*batch d']:
  """What the last connection left, as one stream."""
  if isinstance(state, Ahead):
    return state.read()
  if not isinstance(state, Sublayer):
    return collapse(state)
  if collapse.kind == 'learned':
    return collapse(land(config, state))
  total = api.collapse(*_unwritten(config, state)).reshape(state.y.shape)
  return total / config.streams if collapse.kind == 'mean' else total


def site(context: Context) -> Site:
  """What there is to see as tokens enter a sub-layer."""
  n = context.x.shape[-2]
  x = context.x.reshape(-1, *context.x.shape[-2:]).astype(jnp.float32)
  if context.mappings is None or context.mappings.res is None:
    res = jnp.broadcast_to(jnp.eye(n), (len(x), n, n))
  else:
    res = jnp.moveaxis(context.mappings.res, -1, 0)
  power = jnp.sum(x * x, axis=-1)
  unit = x * jax.lax.rsqrt(power + jnp.finfo(jnp.float32).tiny)[..., None]
  total = jnp.sum(unit, axis=1)
  pairs = max(1, n * (n - 1))
  cosine = (jnp.sum(total * total, axis=-1) - n) / pairs + float(n == 1)
  return Site(res, cosine, jnp.sqrt(jnp.mean(power, axis=-1) / x.shape[-1]))


def _unwritten(config, state):
  """The arguments of the kernels that write the output of a sub-layer."""
  y, (x, mappings) = state
  return (
    x.reshape(-1, *x.shape[-2:]),
    y.reshape(-1, y.shape[-1]),
    mappings.post,
    mappings.res,
    _implementation(config),
  )


def _carries_output(config):
  """Whether the kind reads and writes the streams in one pass of a kernel."""
  kernel = api.fuses(_implementation(config))
  return kernel and config.kind not in ('residual', 'hc', 'mhc_single_pass')


def _implementation(config):
  return None if config.implementation == 'auto' else config.implementation
