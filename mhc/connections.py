r"""Residual connections over n streams, one interface for every kind.

A connection wraps one sub-layer F (attention or FFN, each has its own):

    h, context = connection.pre(x)        h = H_pre x
    x = connection.post(F(h), context)    x <- H_res x + H_post^T F(h)

(mHC, arXiv 2512.24880, Eq. 3) with the streams x in [..., n, d]. The kinds
differ in the mappings, the last also in what it reads:

    residual         n = 1, all mappings 1: the plain residual stream
    hc               unconstrained mappings (HC, arXiv 2409.19606)
    mhc              H_res projected onto the doubly stochastic matrices
    identity         mhc's H_pre and H_post with H_res = I
    mhc_lite         H_res a mixture of permutations (arXiv 2601.05732)
    kromhc           H_res a Kronecker product of 2 x 2 (arXiv 2601.21579)
    orthogonal       H_res a Cayley rotation (arXiv 2602.18308)
    mhc_single_pass  mhc with H_pre one sub-layer early (DeepSeek-V4.1)

Around them, once per model, stand `open_streams` and `close_streams`.
"""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import config as config_lib
from mhc import precision
from mhc import streams
from mhc.hyper import HC, MHC, Ahead, Context, SinglePass


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


Connection = Residual | HC | MHC | SinglePass
State = Float[Array, '*batch n d'] | Ahead


def make(
  config: config_lib.ConnectionConfig, dim: int, index, norm_eps: float
) -> Connection:
  """The connection of sub-layer `index` (attention and FFN counted apart)."""
  shape = (dim, config.streams, index)
  options = dict(
    sinkhorn_iters=config.sinkhorn_iters,
    sinkhorn_eps=config.sinkhorn_eps,
    sinkhorn_backward=config.sinkhorn_backward,
    norm_eps=norm_eps,
  )
  match config.kind:
    case 'residual':
      return Residual()
    case 'hc':
      return HC(*shape, norm_eps=norm_eps)
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
  """What the first connection reads: copies of x."""
  wide = precision.mark('streams', streams.expand(x, config.streams))
  if config.kind != 'mhc_single_pass':
    return wide
  first = jnp.arange(config.streams) == 0
  # Made from x so that, inside a shard_map, it varies over devices as x does.
  zeros = 0 * x.reshape(-1, x.shape[-1])[:, 0].astype(jnp.float32)
  pre = first.astype(jnp.float32)[:, None] + zeros[None]
  return Ahead(wide, pre)


def close_streams(
  state: State, collapse: streams.Collapse
) -> Float[Array, '*batch d']:
  """What the last connection left, as one stream."""
  return state.read() if isinstance(state, Ahead) else collapse(state)


def advance(
  connection: Connection,
  following: Connection,
  y: Float[Array, '*batch d'],
  context: Context,
) -> tuple[Float[Array, '*batch d'], Context]:
  """Leaves one sub-layer and enters the next: `following.pre . post`."""
  return following.pre(connection.post(y, context))


def mixing_matrices(context: Context) -> Float[Array, 't n n']:
  """H_res of every token, I where the kind has no mixing."""
  n = context.x.shape[-2]
  num_tokens = context.x.size // (n * context.x.shape[-1])
  if context.mappings is None or context.mappings.res is None:
    return jnp.broadcast_to(jnp.eye(n), (num_tokens, n, n))
  return jnp.moveaxis(context.mappings.res, -1, 0)
