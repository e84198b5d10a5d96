"""How the streams travel through the transformer: between and around blocks.

`expand_streams` makes them from the embedding, `begin_sublayer` is what every
sub-layer reads, `end_block` what a block hands on, `collapse_streams` what the
last norm reads. Three things are carried:

    streams [..., n, d]     most connections; slots of depth routing
    StreamsWithPre          single-pass mHC: with the next sub-layer's H_pre
    PendingOutput           kernels that write and read in one pass: with the
                            output of the last sub-layer, not written back yet

The plain-JAX implementation gains nothing by a pending output and would keep
the streams twice for the backward pass, so it has none (`kernels.api`).

A layer that only fills a stage of a pipeline (`is_real` False) is an identity
of the streams: H_res = I and H_post = 0. Its parameters are zeros, so that what
its sub-layers return is zero for connections without mappings as well.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mhc import config as config_lib
from mhc import connections
from mhc import functional
from mhc import kernels
from mhc import mixing
from mhc import precision
from mhc import streams
from mhc.connections import StreamsWithPre, own
from mhc.functional import Context
from mhc.kernels import api
from mhc.model import parts


@runtime_checkable
class Connection(Protocol):
  """What stands around a sub-layer: one of `mhc.connections`, or around one."""

  def pre(self, x):
    """State -> what the sub-layer reads [..., d], and the context."""

  def post(self, y, context):
    """What the sub-layer returns, [..., d] -> state."""


class OnePass(Connection, Protocol):
  """A connection that leaves a sub-layer and enters the next in one pass."""

  def advance(self, y, context):
    """`post` of the sub-layer of the context, then `pre` of this one."""


class PendingOutput(NamedTuple):
  """The output y of a sub-layer, and the context to write it back by."""

  y: Float[Array, '*batch d']
  context: Context


# Kinds that are `connections.MHC` with a mixing: one pass over the streams.
MIXINGS: dict[str, mixing.Mixing] = {
  'mhc': 'sinkhorn',
  'identity': 'identity',
  'mhc_lite': 'permutations',
  'kromhc': 'kronecker',
  'cyclic': 'cyclic',
  'tbp': 'tbp',
  'go': 'go',
  'orthogonal': 'cayley',
}
Collapse = streams.Collapse | connections.SlotCollapse
ResidualState = Float[Array, '*batch n d'] | StreamsWithPre | PendingOutput


def make_connection(
  config: config_lib.ConnectionConfig,
  dim: int,
  index,
  norm_eps: float,
  *,
  depth: int,
  is_first: bool,
) -> Connection:
  """The connection of sub-layer `index` (attention and FFN counted apart).

  Args:
    config: of the connections.
    dim: d.
    index: of the sub-layer, of the `depth` that there are.
    norm_eps: of the norms of the network.
    depth: number of sub-layers.
    is_first: whether it is the first one of its block.
  """
  shape = (dim, config.streams, index)
  parts = dict(pre=config.pre, post=config.post, res=config.res)
  implementation = _implementation(config)
  options = dict(
    sinkhorn_iters=config.sinkhorn_iters,
    sinkhorn_eps=config.sinkhorn_eps,
    sinkhorn_backward=config.sinkhorn_backward,
    sinkhorn_method=config.sinkhorn_method,
    norm_eps=norm_eps,
    implementation=implementation,
    **parts,
  )
  if config.is_own:
    return own.make(config.kind, *shape)
  if config.kind in MIXINGS:
    return connections.MHC(
      *shape,
      **options,
      mixing=MIXINGS[config.kind],
      res_diagonal=config.res_diagonal,
      go_size=config.go_size,
      init=config.init,
    )
  match config.kind:
    case 'residual':
      return connections.Residual()
    case 'hc':
      return connections.HC(
        *shape, norm_eps=norm_eps, implementation=implementation, **parts
      )
    case 'mhc_single_pass':
      return connections.SinglePass(
        *shape, **options, res_diagonal=config.res_diagonal
      )
    case 'wide_residual':
      return connections.WideResidual(*shape)
    case 'frac':
      return connections.Frac(dim, config.num_streams, index, norm_eps=norm_eps)
    case 'attn_res_block' | 'attn_res' | 'mhar':
      return connections.AttnRes(
        *shape,
        depth=depth,
        num_heads=config.depth_heads if config.kind == 'mhar' else 1,
        norm_eps=norm_eps,
        implementation=implementation,
      )
    case 'dense_former':
      return connections.DenseFormer(
        *shape, is_first=is_first, implementation=implementation
      )
    case 'x0':
      return connections.X0(
        dim, index, is_first=is_first, implementation=implementation
      )


def make_collapse(config: config_lib.ModelConfig) -> Collapse:
  """What closes the streams of a model."""
  c, shape = config.connection, (config.dim, config.connection.streams)
  if c.kind in config_lib.DEPTH_KINDS:
    return connections.SlotCollapse(
      c.kind if c.kind in ('dense_former', 'x0') else 'attn_res',
      *shape,
      num_heads=c.depth_heads if c.kind == 'mhar' else 1,
      norm_eps=config.norm_eps,
    )
  return streams.Collapse(c.collapse, *shape, norm_eps=config.norm_eps)


def make_expand(config: config_lib.ModelConfig) -> streams.Expand | None:
  """What opens the streams of a model, if that has parameters."""
  if config.connection.expand_scale != 'learned':
    return None
  return streams.Expand(config.dim, config.connection.streams)


@parts.part(parts.CONNECTIONS)
def expand_streams(
  config: config_lib.ConnectionConfig,
  x: Float[Array, '*batch d'],
  expand: streams.Expand | None = None,
) -> ResidualState:
  """Opens the streams: the state of a model with x on every stream.

  Where writing is deferred, copies of x are a pending output x of empty
  streams. Streams that the expansion scales apart are none: they come with an
  empty output.
  """
  n = config.streams
  if config.kind in config_lib.DEPTH_KINDS:
    kind = 'x0' if config.kind == 'x0' else 'attn_res'
    wide = connections.open_slots(x, n, kind)
    return precision.mark('streams', wide)
  if _defers_post(config) and config.expand_scale == 'ones':
    return _pending(config, x)
  zeros = _zeros(x)
  wide = expand(x) if expand else streams.expand(x, n, config.expand_scale)
  wide = precision.mark('streams', wide)
  if config.kind != 'mhc_single_pass':
    return with_empty_pending_output(config, wide)
  first = jnp.arange(n) == 0
  return StreamsWithPre(wide, first.astype(jnp.float32)[:, None] + zeros[None])


@parts.part(parts.CONNECTIONS)
def begin_sublayer(
  connection: Connection,
  before: ResidualState,
  is_real: Bool[Array, ''] | None = None,
) -> tuple[Float[Array, '*batch d'], Context]:
  """Returns what a sub-layer reads, and the context to write it back by.

  Args:
    connection: of the sub-layer.
    before: the state that the last block returned or, inside of one, a pending
      output.
    is_real: False for a layer that is to change nothing; None for True.
  """
  if isinstance(before, PendingOutput):
    h, context = connection.advance(*before)
  else:
    h, context = connection.pre(before)
  if is_real is None or context.mappings is None:
    return h, context
  pre, post, res = context.mappings
  if res is not None:
    res = jnp.where(is_real, res, jnp.eye(len(res), dtype=res.dtype)[..., None])
  # Single-pass mHC hands H_pre to the next sub-layer: it is to stay as it was.
  if isinstance(before, StreamsWithPre):
    pre = jnp.where(is_real, pre, before.weights)
  elif isinstance(before, PendingOutput):
    pre = jnp.where(is_real, pre, before.context.mappings.pre)
  mappings = functional.Mappings(pre, jnp.where(is_real, post, 0), res)
  return h, context._replace(mappings=mappings)


def read_weights(
  connection: Connection, before: ResidualState, context: Context
) -> Float[Array, 'm t'] | None:
  """H_pre by which a sub-layer has read, None for the plain residual.

  It is of m streams, or the m fractions of one.

  Args:
    connection: of the sub-layer.
    before, context: what `begin_sublayer` was given, and has returned. The
      mappings of single-pass mHC have the H_pre of the next sub-layer.
  """
  if context.mappings is None:
    return None
  if not isinstance(connection, connections.SinglePass):
    return context.mappings.pre
  if isinstance(before, PendingOutput):
    return before.context.mappings.pre
  return before.weights


def between_sublayers(
  connection: Connection, first: PendingOutput
) -> ResidualState:
  """The state after a block's first sub-layer, for `begin_sublayer`."""
  return first if hasattr(connection, 'advance') else connection.post(*first)


@parts.part(parts.CONNECTIONS)
def end_block(
  config: config_lib.ConnectionConfig,
  connection: Connection,
  last: PendingOutput,
  before: ResidualState | None = None,
  is_real: Bool[Array, ''] | None = None,
) -> ResidualState:
  """The state that a block returns after its last sub-layer.

  It is `before`, that of the block before, behind one that is not real.
  """
  if _defers_post(config):
    return last
  state = connection.post(*last)
  if is_real is None or not config.is_own:
    return state
  return jax.tree.map(functools.partial(jnp.where, is_real), state, before)


@parts.part(parts.CONNECTIONS)
def flush_pending_output(
  config: config_lib.ConnectionConfig, state: ResidualState
) -> ResidualState:
  """Writes a pending output back: plain streams leave a pipeline stage."""
  if not isinstance(state, PendingOutput):
    return state
  x = state.context.x
  return kernels.post(*_pending_post_args(config, state)).reshape(x.shape)


@parts.part(parts.CONNECTIONS)
def with_empty_pending_output(
  config: config_lib.ConnectionConfig, state: ResidualState
) -> ResidualState:
  """The inverse of `flush_pending_output`, for the next stage of a pipeline."""
  if not _defers_post(config):
    return state
  return _pending(config, 0 * state[..., 0, :], state)


@parts.part(parts.CONNECTIONS)
def collapse_streams(
  config: config_lib.ConnectionConfig,
  state: ResidualState,
  collapse: Collapse,
) -> Float[Array, '*batch d']:
  """The state of the last block as one stream."""
  if isinstance(state, StreamsWithPre):
    return state.read()
  if not isinstance(state, PendingOutput):
    return collapse(state)
  if collapse.kind == 'learned':
    return collapse(flush_pending_output(config, state))
  total = kernels.collapse(*_pending_post_args(config, state))
  total = total.reshape(state.y.shape)
  return total / config.streams if collapse.kind == 'mean' else total


def _pending(config, y, x=None):
  """An output y that is to be added to each of the streams x, 0 for None."""
  n, zeros = config.streams, _zeros(y)
  res = None
  if config.mixes_streams:
    res = jnp.eye(n, dtype=zeros.dtype)[..., None] + zeros[None, None]
  ones = jnp.ones((n, 1), zeros.dtype) + zeros[None]
  if x is None:
    x = precision.mark('streams', streams.expand(0 * y, n))
  return PendingOutput(y, Context(x, functional.Mappings(ones, ones, res)))


def _zeros(x):
  """Zeros [t] that vary, inside a shard_map, over devices as x does."""
  return 0 * x.reshape(-1, x.shape[-1])[:, 0].astype(jnp.float32)


def _pending_post_args(config, state):
  """The arguments of the kernels that write a sub-layer's output back."""
  y, (x, mappings) = state
  return (
    x.reshape(-1, *x.shape[-2:]),
    y.reshape(-1, y.shape[-1]),
    mappings.post,
    mappings.res,
    _implementation(config),
  )


def _defers_post(config):
  """Whether the kind reads and writes the streams in one pass of a kernel."""
  return config.kind in MIXINGS and api.defers_post(_implementation(config))


def _implementation(config):
  return None if config.implementation == 'auto' else config.implementation
