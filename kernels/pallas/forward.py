r"""The forward pass over a tile of tokens: write back, project, read.

The whole rows of n d numbers of a tile are on chip, so that the streams go
through HBM once: `advance` reads x and y and writes x' and h, (2 n + 2) d
numbers a token. In blocks of channels, x' = B [x; y] on the matrix unit (see
`block_diagonal`), its squares and its product with phi are added up; then the
weights of H_pre are known, and h is read from x' on chip. All three are of x'
as it is written, in the streams' dtype.

`refs` holds the references by name, as `specs` declares them, and `sizes` is
the `specs.Sizes` of the call.
"""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mhc.kernels.pallas import block_diagonal

ROWS = 16  # tokens of an inner loop over vector registers


def kernel(refs, sizes):
  """`advance`, or as much of it as `sizes.writes` and `sizes.reads` say."""
  source = refs.x
  if sizes.writes:
    stacked = stacked_coefficients(refs, sizes)
    block_diagonal.scatter_to_diagonals(stacked, refs.to_mix, refs.mix, sizes)
    source = refs.x_next
  if sizes.reads:
    refs.squares[...] = jnp.zeros_like(refs.squares)
    refs.product[...] = jnp.zeros_like(refs.product)

  def step(number, _):
    start = pl.multiple_of(number * sizes.channel_block, sizes.channel_block)
    if sizes.writes:
      _write(refs, sizes, start)
    elif sizes.reads:
      _square(refs, sizes, start)
    if sizes.reads:
      refs.product[...] += _project(refs.phi, source, sizes, start)
    return 0

  jax.lax.fori_loop(0, sizes.dim // sizes.channel_block, step, 0)
  if sizes.reads:
    _read(refs, sizes, source)


def collapse(refs, sizes):
  """The sum of the streams behind the last sub-layer, [t, d]."""
  streams = [(refs.x, (j,)) for j in range(sizes.n)] + [(refs.y, ())]
  _weighted_sum(collapse_weights(refs, sizes), streams, refs, sizes)


def stacked_coefficients(refs, sizes):
  """Returns [res; post] as `scatter_to_diagonals` takes it."""
  coefficients = jnp.concatenate([refs.res[...], refs.post[...]])
  return block_diagonal.transpose_split(
    coefficients, 2 if sizes.is_bfloat16 else 3
  )


def collapse_weights(refs, sizes):
  """Returns the weights of each stream and of y in the sum: [n + 1, t]."""
  rows = refs.res[...].reshape(sizes.n, sizes.n, sizes.tokens)
  total = jnp.sum(rows, axis=0)
  return jnp.concatenate(
    [total, jnp.sum(refs.post[...], axis=0, keepdims=True)]
  )


def read_weights(z, refs, sizes):
  """Returns H_pre, [n, t]; `gate` holds alpha and the bias."""
  return jax.nn.sigmoid(z[: sizes.n] * refs.gate[:, 0:1] + refs.gate[:, 1:2])


def _write(refs, sizes, start):
  """Writes x' of one block of channels, and adds up its squares."""
  lanes = pl.ds(start, sizes.channel_block)
  group = sizes.fwd_group
  for rows in block_diagonal.row_slices(sizes.tokens, group):
    stream_rows = [refs.x[j, rows, lanes] for j in range(sizes.n)]
    stream_rows.append(refs.y[rows, lanes])
    mixed = block_diagonal.mix(refs.mix, rows, stream_rows, sizes.n, sizes)
    streams = [
      mixed[i * group : (i + 1) * group].astype(refs.x_next.dtype)
      for i in range(sizes.n)
    ]
    for i, stream in enumerate(streams):
      refs.x_next[i, rows, lanes] = stream
    if sizes.reads:
      _add_squares(refs, rows, streams)


def _square(refs, sizes, start):
  """Adds up the squares of one block of channels of x."""
  lanes = pl.ds(start, sizes.channel_block)
  for rows in block_diagonal.row_slices(sizes.tokens, ROWS):
    _add_squares(refs, rows, [refs.x[j, rows, lanes] for j in range(sizes.n)])


def _add_squares(refs, rows, streams):
  total = refs.squares[rows]
  for stream in streams:
    stream = stream.astype(jnp.float32)
    for lane in range(0, stream.shape[1], block_diagonal.LANES):
      part = stream[:, lane : lane + block_diagonal.LANES]
      total = total + part * part
  refs.squares[rows] = total


def _project(phi, source, sizes, start):
  """Returns phi^T x of one block of channels, [parts of k, t]."""
  total = None
  for j in range(sizes.n):
    of_stream = pl.ds(
      pl.multiple_of(j * sizes.dim + start, block_diagonal.LANES),
      sizes.channel_block,
    )
    term = block_diagonal.dot(
      phi[:, of_stream],
      source[j, :, pl.ds(start, sizes.channel_block)],
      sizes,
      ((1,), (1,)),
    )
    total = term if total is None else total + term
  return total


def _read(refs, sizes, source):
  """Writes z, 1 / rms, and h, which is read from the streams in `source`."""
  ones = jnp.ones((8, block_diagonal.LANES), jnp.bfloat16)
  total = block_diagonal.lane_sums(ones, refs.squares[...], sizes)[:1]
  scale = jax.lax.rsqrt(total / (sizes.n * sizes.dim) + sizes.norm_eps)
  product = refs.product[...].reshape(-1, sizes.padded_rows, sizes.tokens)
  z = jnp.sum(product, axis=0) * scale
  refs.z[...] = z[: sizes.k]
  refs.scale[...] = scale
  streams = [(source, (j,)) for j in range(sizes.n)]
  _weighted_sum(read_weights(z, refs, sizes), streams, refs, sizes)


def _weighted_sum(weights, streams, refs, sizes):
  """Writes h = sum_m weights_m x_m.

  Args:
    weights: [m, t].
    streams: a reference and the index of the stream in it, m times.
    refs, sizes: of the kernel.
  """
  block_diagonal.broadcast_to_lanes(weights, refs.spread, sizes)

  def rows_of(number, _):
    rows = pl.ds(pl.multiple_of(number * ROWS, ROWS), ROWS)
    for start in range(0, sizes.dim, block_diagonal.LANES):
      lanes = pl.ds(start, block_diagonal.LANES)
      total = None
      for m, (source, index) in enumerate(streams):
        x = source[(*index, rows, lanes)]
        term = refs.spread[m, rows] * x.astype(jnp.float32)
        total = term if total is None else total + term
      refs.h[rows, lanes] = total.astype(refs.h.dtype)
    return 0

  jax.lax.fori_loop(0, sizes.tokens // ROWS, rows_of, 0)
