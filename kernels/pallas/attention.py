r"""Causal attention as two TPU kernels, which keep no logits.

    s_qk = scale q . k,   k <= q;     w = exp(s - L_q);     o_q = sum_k w_qk v_k
    L_q  = log sum_k exp(s_qk)

    D_q  = sum_v o_qv do_qv                 (outside)
    ds   = w (do . v - D_q)
    dv_k = sum_q w_qk do_q,   dk_k = scale sum_q ds_qk q_q,   dq_q likewise

(the online softmax of FlashAttention, arXiv 2205.14135, and its backward pass.)
Heads come first and are shared by the cores of a chip. The tiles of the lower
triangle are a list in scalar memory, so that nothing above the diagonal is
fetched or computed. Logits lie as [keys, queries]: the softmax then sums over
sublanes, and its statistics are rows. Forward goes through the tiles query by
query; backward key by key, with the gradient of all queries of a head in vector
memory, which bounds the length. Logarithms and exponentials are of base 2.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mhc import axes
from mhc.kernels import chips
from mhc.kernels.pallas import launch

BLOCKS = (1024, 512, 256, 128)  # queries, and keys, of a tile
FIXED = 256  # what a tile costs beside its products, as queries
HIDDEN = -1e30  # the logit of a key after the query
LOG2_E = math.log2(math.e)
SUBLANES = 8
_ROWS = (((1,), (1,)), ((), ()))  # a b^T
_PLAIN = (((1,), (0,)), ((), ()))  # a b


class Sizes(NamedTuple):
  """Sizes of a call: h heads of t tokens, in tiles of `block`."""

  heads: int
  tokens: int  # padded
  keys: int  # numbers of a query and of a key
  values: int
  block: int
  dtype: jax.typing.DTypeLike

  @property
  def side(self) -> int:
    """Tiles along a side of the triangle."""
    return self.tokens // self.block

  @property
  def tiles(self) -> int:
    return self.side * (self.side + 1) // 2


def forward(
  q: Float[Array, 'h t k'],
  k: Float[Array, 'h t k'],
  v: Float[Array, 'h t v'],
  scale: float,
) -> tuple[Float[Array, 'h t v'], Float[Array, 'h t']]:
  """The weighted values, in their dtype, and log2(e) L, float32.

  Raises:
    NotImplementedError: sizes that the kernels, backward included, do not take.
  """
  here, chip = launch.machine()
  sizes = make_sizes(q.shape, v.shape[2], v.dtype, chip)
  tokens = q.shape[1]
  q, k, v = (_padded(x, sizes.tokens) for x in (q, k, v))
  query, key, row = _specs(sizes)
  out, log_sum = _call(
    functools.partial(_forward, scale=scale * LOG2_E),
    'attention_forward',
    sizes,
    _tiles(sizes.side, by_key=False),
    [q, k, jnp.swapaxes(v, 1, 2)],
    [
      query(sizes.keys),
      key(sizes.keys),
      pl.BlockSpec(
        (None, sizes.values, sizes.block), lambda h, p, at: (h, 0, at[1, p])
      ),
    ],
    [(sizes.tokens, sizes.values), (1, sizes.tokens)],
    [query(sizes.values), row],
    [
      pltpu.VMEM((1, sizes.block), jnp.float32),
      pltpu.VMEM((1, sizes.block), jnp.float32),
      pltpu.VMEM((sizes.values, sizes.block), jnp.float32),
    ],
    [sizes.dtype, jnp.float32],
    products=sizes.keys + sizes.values,
    moved=2 * sizes.keys + 2 * sizes.values,
    interpret=here != 'tpu',
  )
  return out[:, :tokens], log_sum[:, 0, :tokens]


def backward(
  q: Float[Array, 'h t k'],
  k: Float[Array, 'h t k'],
  v: Float[Array, 'h t v'],
  out: Float[Array, 'h t v'],
  log_sum: Float[Array, 'h t'],
  d_out: Float[Array, 'h t v'],
  scale: float,
) -> tuple[Float[Array, 'h t k'], Float[Array, 'h t k'], Float[Array, 'h t v']]:
  """Gradients of q, k and v; `out` and `log_sum` are those of `forward`."""
  here, chip = launch.machine()
  sizes = make_sizes(q.shape, v.shape[2], v.dtype, chip)
  tokens = q.shape[1]
  wide = jnp.float32
  delta = jnp.sum(out.astype(wide) * d_out.astype(wide), axis=2)
  q, k, v, d_out = (_padded(x, sizes.tokens) for x in (q, k, v, d_out))
  rows = [
    _padded(x[..., None], sizes.tokens)[..., 0][:, None]
    for x in (log_sum, delta)
  ]
  query, key, row = _specs(sizes)
  whole = pl.BlockSpec(
    (None, sizes.tokens, sizes.keys), lambda h, p, at: (h, 0, 0)
  )
  grads = _call(
    functools.partial(_backward, scale=scale, side=sizes.side),
    'attention_backward',
    sizes,
    _tiles(sizes.side, by_key=True),
    [q, k, v, d_out, *rows],
    [
      query(sizes.keys),
      key(sizes.keys),
      key(sizes.values),
      query(sizes.values),
      row,
      row,
    ],
    [
      (sizes.tokens, sizes.keys),
      (sizes.tokens, sizes.keys),
      (sizes.tokens, sizes.values),
    ],
    [whole, key(sizes.keys), key(sizes.values)],
    [
      pltpu.VMEM((sizes.keys, sizes.tokens), jnp.float32),
      pltpu.VMEM((sizes.block, sizes.keys), jnp.float32),
      pltpu.VMEM((sizes.block, sizes.values), jnp.float32),
      pltpu.VMEM((sizes.keys, sizes.block), sizes.dtype),
    ],
    [sizes.dtype] * 3,
    products=3 * sizes.keys + 2 * sizes.values,
    moved=4 * sizes.keys + 3 * sizes.values,
    interpret=here != 'tpu',
  )
  return tuple(grad[:, :tokens] for grad in grads)


def make_sizes(
  shape: tuple[int, int, int], values: int, dtype, chip: chips.Chip
) -> Sizes:
  """Sizes of a call, in the tiles that take the shortest of those that fit.

  Raises:
    NotImplementedError: with what does not fit, or is no multiple.
  """
  heads, tokens, keys = shape
  if keys % SUBLANES or values % SUBLANES:
    raise NotImplementedError(
      f'heads of {keys} and {values} numbers are no multiples of {SUBLANES}'
    )
  found = [
    Sizes(heads, -(-tokens // block) * block, keys, values, block, dtype)
    for block in BLOCKS
  ]
  fitting = [one for one in found if memory(one) <= chip.vector_memory]
  if not fitting:
    least = min(map(memory, found))
    raise NotImplementedError(
      f'{tokens} tokens of {keys} numbers take {least / launch.MiB:.0f} MiB of '
      f'vector memory, there are {chip.vector_memory // launch.MiB} MiB'
    )
  return min(
    fitting, key=lambda one: one.tiles * one.block * (one.block + FIXED)
  )


def memory(sizes: Sizes) -> int:
  """Bytes of vector memory of the backward kernel, which takes the more."""
  lanes = 128

  def padded(number):
    return -(-number // lanes) * lanes

  size, block = sizes.dtype.itemsize, sizes.block
  keys, values = padded(sizes.keys), padded(sizes.values)
  blocks = 2 * size * block * (3 * keys + 3 * values) + 4 * SUBLANES * block * 4
  gradient = sizes.tokens * (2 * size * keys + 4 * sizes.keys)
  scratch = block * (4 * (keys + values) + size * sizes.keys)
  logits = 6 * 4 * block * block  # that the compiler keeps at once
  return launch.RESERVE + blocks + gradient + scratch + logits


def _call(
  kernel,
  name,
  sizes,
  tiles,
  operands,
  in_specs,
  shapes,
  out_specs,
  scratch,
  dtypes,
  *,
  products,
  moved,
  interpret,
):
  """Runs a kernel over all heads and tiles."""
  area = sizes.heads * sizes.tiles * sizes.block**2
  again = sizes.heads * (sizes.tiles - sizes.side) * sizes.block
  size = sizes.dtype.itemsize
  varying = axes.varying_axes(operands)
  tiles, *operands = axes.cast_varying([tiles, *operands], varying)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(sizes.heads, sizes.tiles),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=[
      axes.struct_varying_as(operands[0], (sizes.heads, *shape), dtype)
      for shape, dtype in zip(shapes, dtypes, strict=True)
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=memory(sizes),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * area * products,
      transcendentals=area,
      bytes_accessed=size
      * (
        sizes.heads * sizes.tokens * moved + again * (sizes.keys + sizes.values)
      ),
    ),
    name=name,
    interpret=interpret,
  )(tiles, *operands)


def _specs(sizes):
  """Blocks of the tile's queries, of its keys, and of a row of statistics."""

  def query(width):
    return pl.BlockSpec(
      (None, sizes.block, width), lambda h, p, at: (h, at[0, p], 0)
    )

  def key(width):
    return pl.BlockSpec(
      (None, sizes.block, width), lambda h, p, at: (h, at[1, p], 0)
    )

  row = pl.BlockSpec((None, 1, sizes.block), lambda h, p, at: (h, 0, at[0, p]))
  return query, key, row


def _tiles(side, by_key):
  """(query, key) of each tile of the triangle, int32 [2, tiles]."""
  query, key = np.tril_indices(side)
  if by_key:
    order = np.lexsort((query, key))
    query, key = query[order], key[order]
  return jnp.asarray(np.stack([query, key]).astype(np.int32))


def _padded(x, tokens):
  """Zeros behind the last token: no query before them sees them."""
  return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0)))


def _dot(a, b, dimensions):
  return jax.lax.dot_general(
    a, b, dimensions, preferred_element_type=jnp.float32
  )


def _causal(logits, query, key):
  """Hides keys after their query, in a tile [keys, queries].

  In every tile: a branch for those on the diagonal would save nothing, for the
  matrix unit is busy for longer.
  """
  ahead = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
  ahead -= jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.where(ahead <= (query - key) * len(logits), logits, HIDDEN)


def _forward(at, q, k, vt, out, log_sum, top, total, wide, *, scale):
  number = pl.program_id(1)
  query, key = at[0, number], at[1, number]

  @pl.when(key == 0)
  def _():
    top[...] = jnp.full_like(top, HIDDEN)
    total[...] = jnp.zeros_like(total)
    wide[...] = jnp.zeros_like(wide)

  logits = _causal(_dot(k[...], q[...], _ROWS) * scale, query, key)
  before = top[...]
  new = jnp.maximum(before, jnp.max(logits, axis=0, keepdims=True))
  weights = jnp.exp2(logits - new)
  decay = jnp.exp2(before - new)
  top[...] = new
  total[...] = decay * total[...] + jnp.sum(weights, axis=0, keepdims=True)
  values = _dot(vt[...], weights.astype(vt.dtype), _PLAIN)
  wide[...] = decay * wide[...] + values

  @pl.when(query == key)
  def _():
    out[...] = (wide[...] / total[...]).T.astype(out.dtype)
    log_sum[...] = top[...] + jnp.log2(total[...])


def _backward(
  at,
  q,
  k,
  v,
  d_out,
  log_sum,
  delta,
  dq,
  dk,
  dv,
  wide_q,
  wide_k,
  wide_v,
  kt,
  *,
  scale,
  side,
):
  number = pl.program_id(1)
  query, key = at[0, number], at[1, number]
  block = k.shape[0]

  @pl.when(number == 0)
  def _():
    wide_q[...] = jnp.zeros_like(wide_q)

  @pl.when(query == key)  # the first tile of these keys
  def _():
    wide_k[...] = jnp.zeros_like(wide_k)
    wide_v[...] = jnp.zeros_like(wide_v)
    kt[...] = k[...].T

  place = pl.ds(pl.multiple_of(query * block, block), block)

  logits = _dot(k[...], q[...], _ROWS) * (scale * LOG2_E)
  weights = jnp.exp2(_causal(logits, query, key) - log_sum[...])
  wide_v[...] += _dot(weights.astype(d_out.dtype), d_out[...], _PLAIN)
  d_weights = _dot(v[...], d_out[...], _ROWS)
  d_logits = (weights * (d_weights - delta[...])).astype(q.dtype)
  wide_k[...] += _dot(d_logits, q[...], _PLAIN)
  wide_q[:, place] += _dot(kt[...], d_logits, _PLAIN)

  # These keys are the last that the queries of the same number see.
  @pl.when(query == key)
  def _():
    dq[place, :] = (wide_q[:, place] * scale).T.astype(dq.dtype)

  @pl.when(query == side - 1)
  def _():
    dk[...] = (wide_k[...] * scale).astype(dk.dtype)
    dv[...] = wide_v[...].astype(dv.dtype)
