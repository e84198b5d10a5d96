r"""Depth routing: sub-layers that choose among the outputs of earlier ones.

The streams are slots along the depth. Slot 0 holds the embedding v_0, the
others what sub-layers have returned since; `open_slots` opens them and
`SlotCollapse` closes them. A sub-layer reads some of the slots and adds its
output to one of them:

    AttnRes      softmax over the slots (Attention Residuals, arXiv 2603.15031),
                 of all channels or of each head's (MHAR, arXiv 2607.27230)
    DenseFormer  a static sum before each block (arXiv 2402.02622)
    X0           the embedding, added again before each block

Where a sub-layer stands decides what it reads. A whole number is kept beside
the parameters, in the structure of the module; a traced one, of stacked blocks,
is kept among them, as `place`, which has no gradient.
"""

from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mhc import arguments
from mhc import axes
from mhc import explicit
from mhc import functional
from mhc import kernels
from mhc import observation
from mhc import precision
from mhc.connections import mapped
from mhc.context import Context, Mappings
from mhc.kernels.xla import streams

SlotKind = Literal['attn_res', 'dense_former', 'x0']


class _Routed(mapped.Mapped):
  """A connection that knows where it stands."""

  names: tuple[str, ...] = ()  # of its parameters

  def __init__(self, dim, num_slots, index, implementation):
    arguments.check_place(dim, num_slots, index)
    self.shape = (num_slots, dim)
    self.implementation = implementation
    self.index = None
    if isinstance(index, int):
      self.index = index
    else:
      self.place = nnx.Param(jnp.full(1, index, jnp.float32))

  @property
  def params(self) -> dict[str, nnx.Param]:
    names = self.names if self.index is not None else (*self.names, 'place')
    return {name: getattr(self, name) for name in names}

  def _where(self, params) -> Int[Array, '']:
    """The index of the sub-layer."""
    if self.index is not None:
      return jnp.asarray(self.index, jnp.int32)
    place = jax.lax.stop_gradient(params['place'][0])
    return jnp.round(place).astype(jnp.int32)

  def _slots(self):
    return jnp.arange(self.shape[0], dtype=jnp.int32)


class AttnRes(_Routed):
  r"""Attention Residuals (arXiv 2603.15031), full or by blocks of the depth.

  The `depth` sub-layers are cut into n - 1 runs of equal length, one longer
  where they do not divide; slot b > 0 is the sum of what run b has returned. A
  sub-layer of run b reads

      h = sum_j a_j x_j,   a = softmax_j (w . RMSNorm(x_j))

  over the slots before b, and over b itself unless it is the first of its run;
  then its output is added to x_b. With n = depth + 1 each run is one sub-layer,
  which is the full form. The norm has no gain, which would be part of w.

  With several heads the channels are cut into as many groups of equal width,
  and each has a softmax of its own, over the products of its channels; probes
  see the mean of them as H_pre.

  w [d] starts as 0: as the mean of those slots, which is not the plain network.
  d parameters.
  """

  names = ('query',)

  def __init__(
    self,
    dim: int,
    num_slots: int,
    index,
    *,
    depth: int,
    num_heads: int = 1,
    norm_eps: float = 1e-20,
    implementation: kernels.Implementation | None = None,
    rngs: nnx.Rngs | None = None,
  ):
    """`depth` is the number of sub-layers of the network.

    Raises:
      ValueError: there are more runs than sub-layers, or none, or the heads do
        not divide `dim`.
    """
    del rngs
    super().__init__(dim, num_slots, index, implementation)
    check_slots(num_slots, depth)
    check_heads(num_heads, dim)
    self.query = nnx.Param(jnp.zeros(dim, jnp.float32))
    self.depth, self.num_heads, self.norm_eps = depth, num_heads, norm_eps

  def pre(
    self, x: Float[Array, '*batch n d']
  ) -> tuple[Float[Array, '*batch d'], Context]:
    if self.num_heads == 1:
      return super().pre(x)
    found = mapped.context(self, self.mixes, x)
    observation.record(*found)

    def run(params, x):
      h = _read_by_heads(self._weights(params, functional.tokens(x)), x)
      return precision.mark('sublayer_input', h)

    params = functional.float32(self.params)
    return explicit.call(run, x, functional.spec_read, params, x), found

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
    weights = jnp.mean(self._weights(params, x), axis=1)
    current = self._slots() == 1 + self._run(self._where(params))
    return Mappings(weights, _as(weights, current), None)

  def _weights(self, params, x) -> Float[Array, 'n h t']:
    index, slots = self._where(params), self._slots()
    current = 1 + self._run(index)
    is_first = (index == 0) | (self._run(index - 1) < self._run(index))
    used = (slots < current) | ((slots == current) & ~is_first)
    scores = _scores(params['query'], x, self.norm_eps, self.num_heads)
    scores = jnp.where(used[:, None, None], scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=0)

  def _run(self, index):
    """Number of the run that a sub-layer belongs to, from 0."""
    return (index * (self.shape[0] - 1)) // self.depth


class DenseFormer(_Routed):
  r"""Depth-weighted averages (DenseFormer, arXiv 2402.02622, dilation 1).

  Slot j > 0 is what block j has handed on. Before block i > 1

      y_i = sum_{j < i} weights_j x_j

  takes the place of the output of the block before it, and the block adds its
  two sub-layers to it. The weights [n] start one-hot at the block before, so
  that the network is the plain one; those of the block in hand and of later
  ones are not used, nor any of the first block. The sub-layers are counted as
  attention and FFN in turn; those of odd index have no parameters.

  Args:
    index: of the sub-layer.
    is_first: whether it is the first of its block; needed where `index` is
      traced.
  """

  def __init__(
    self,
    dim: int,
    num_slots: int,
    index,
    *,
    is_first: bool | None = None,
    implementation: kernels.Implementation | None = None,
    rngs: nnx.Rngs | None = None,
  ):
    del rngs
    super().__init__(dim, num_slots, index, implementation)
    self.mixes = index % 2 == 0 if is_first is None else is_first
    if self.mixes:
      self.names = ('weights',)
      self.weights = nnx.Param(_one_hot(num_slots, index // 2))

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
    block, slots, n = self._where(params) // 2, self._slots(), self.shape[0]
    current = _as(x[:, :, 0].T, slots == block + 1)
    if not self.mixes:
      return Mappings(current, current, None)
    only = (slots == 0).astype(jnp.float32)  # of the first block
    weights = jnp.where(block == 0, only, params['weights'])
    weights = jnp.where(slots <= block, weights, jnp.zeros_like(weights))
    read, eye = _as(current, weights), jnp.eye(n, dtype=jnp.float32)
    res = eye[..., None] + current[:, None] * read[None]
    return Mappings(read, current, res)


class X0(_Routed):
  """The embedding, added again before each block (modded-nanogpt).

      x <- a x + b x_0

  in front of attention, x the first of two slots and x_0 the second, which
  stays as it is. a = 1 and b = 0 at the start: the plain network. Two
  parameters; those of the FFN, `is_first` False, has none.
  """

  def __init__(
    self,
    dim: int,
    index,
    *,
    is_first: bool | None = None,
    implementation: kernels.Implementation | None = None,
    rngs: nnx.Rngs | None = None,
  ):
    del rngs
    is_first = index % 2 == 0 if is_first is None else is_first
    super().__init__(dim, 2, 0, implementation)
    self.mixes = is_first
    if is_first:
      self.names = ('scales',)
      self.scales = nnx.Param(jnp.array([1.0, 0.0], jnp.float32))

  def mappings_by(self, params, x: Float[Array, 't n d']) -> Mappings:
    """The mappings by parameters given as arrays."""
    zeros = 0 * x[:, 0, 0].astype(jnp.float32)
    one, zero = zeros + 1, zeros
    post = jnp.stack([one, zero])
    if not self.mixes:
      return Mappings(post, post, None)
    read = params['scales'][:, None] + zeros[None]
    return Mappings(read, post, jnp.stack([read, jnp.stack([zero, one])]))


class SlotCollapse(nnx.Module):
  r"""Closes the slots, [..., n, d] -> [..., d], once per model.

  As a sub-layer behind the last one would read: 'attn_res' by a query [d] over
  all slots, with `num_heads` softmaxes, 'dense_former' by weights [n], which
  start at the last slot, 'x0' the first slot, without parameters.
  """

  def __init__(
    self,
    kind: SlotKind,
    dim: int,
    num_slots: int,
    *,
    num_heads: int = 1,
    norm_eps: float = 1e-20,
  ):
    arguments.check_place(dim, num_slots, 0)
    check_heads(num_heads, dim)
    self.kind, self.shape, self.norm_eps = kind, (num_slots, dim), norm_eps
    self.num_heads = num_heads
    if kind == 'attn_res':
      self.query = nnx.Param(jnp.zeros(dim, jnp.float32))
    if kind == 'dense_former':
      self.weights = nnx.Param(_one_hot(num_slots, num_slots - 1))

  def __call__(self, x: Float[Array, '*batch n d']) -> Float[Array, '*batch d']:
    """Closes the slots.

    Raises:
      ValueError: x is not of as many slots of this width.
    """
    arguments.check_streams(x, *self.shape)
    if self.kind == 'x0':
      return x[..., 0, :]
    own = self.query if self.kind == 'attn_res' else self.weights
    params = functional.float32({'own': own})
    return explicit.call(self._weighted, x, functional.spec_read, params, x)

  def _weighted(self, params, x):
    tokens = functional.tokens(x)
    if self.kind == 'attn_res':
      scores = _scores(params['own'], tokens, self.norm_eps, self.num_heads)
      return _read_by_heads(jax.nn.softmax(scores, axis=0), x)
    weights = _as(tokens[:, :, 0].T, params['own'])
    return streams.read(tokens, weights).reshape(*x.shape[:-2], x.shape[-1])


def open_slots(
  x: Float[Array, '*batch d'], num_slots: int, kind: SlotKind = 'attn_res'
) -> Float[Array, '*batch n d']:
  """The embedding in slot 0, and nothing in the others; in both for 'x0'."""
  arguments.check_place(x.shape[-1], num_slots, 0)
  if kind == 'x0':
    return jnp.stack([x, x], axis=-2)
  widths = [(0, 0)] * (x.ndim - 1) + [(0, num_slots - 1), (0, 0)]
  return jnp.pad(x[..., None, :], widths)


def check_slots(num_slots: int, depth: int):
  """Raises ValueError unless `depth` sub-layers fill the other slots."""
  if not 2 <= num_slots <= depth + 1:
    raise ValueError(
      f'{num_slots} slots are the embedding and {num_slots - 1} runs of '
      f'{depth} sub-layers: take from 2 to {depth + 1}'
    )


def check_heads(num_heads: int, dim: int):
  """Raises ValueError unless the heads divide the channels."""
  if num_heads < 1 or dim % num_heads:
    raise ValueError(
      f'{num_heads} heads do not divide dim={dim}: take a number that does'
    )


def _scores(query, x, eps, num_heads) -> Float[Array, 'n h t']:
  """query . RMSNorm(x_j) of each slot, head by head; 0 of an empty slot."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1) + eps)
  products = jnp.einsum(
    'tnhe,he->nht',
    wide.reshape(*x.shape[:2], num_heads, -1),
    query.reshape(num_heads, -1),
    precision=streams.HIGHEST,
  )
  return products * inverse.T[:, None]


def _read_by_heads(weights, x):
  """[n, h, t], [..., n, d] -> [..., d]: each head's channels by its weights."""
  n, heads, t = weights.shape
  # A head of a token is as good as a token.
  tokens = x.reshape(t, n, heads, x.shape[-1] // heads).swapaxes(1, 2)
  tokens = tokens.reshape(t * heads, n, -1)
  h = streams.read(tokens, weights.swapaxes(1, 2).reshape(n, -1))
  return h.reshape(*x.shape[:-2], x.shape[-1])


def _as(like, values) -> Float[Array, 'n t']:
  """Numbers [n] for each token of `like` [n, t], varying over devices as it."""
  wide = jnp.broadcast_to(values.astype(jnp.float32)[:, None], like.shape)
  return axes.cast_varying(wide, axes.varying_axes(like))


def _one_hot(n, at) -> Float[Array, 'n']:
  numbers = jnp.arange(n)
  return (numbers == jnp.asarray(at, numbers.dtype)).astype(jnp.float32)
