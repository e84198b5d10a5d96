r"""The forward pass over a tile of tokens: write back, project, read.

Of a tile the whole rows of n d numbers are on chip, so that the streams go
through HBM once: `advance` reads x and y and writes x' and h, (2 n + 2) d
numbers a token. In chunks of channels, x' = B [x; y] on the matrix unit (see
`diagonal`), its squares and its product with phi are added up; then the
weights of H_pre are known, and h is read from x' on chip.

`r` holds the references by name and `p` the sizes, see `passes`.
"""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mhc.kernels.pallas import block_diagonal

ROWS = 16  # tokens of an inner loop over vector registers


def kernel(r, p):
  source = r.x
  if p.writes:
    coefficients = jnp.concatenate([r.res[...], r.post[...]])
    stacked = block_diagonal.columns(coefficients, 2 if p.is_bfloat16 else 3)
    block_diagonal.spread_diagonals(stacked, r.to_mix, r.mix, p.group)
    source = r.x_next
  if p.reads:
    r.squares[...] = jnp.zeros_like(r.squares)
    r.product[...] = jnp.zeros_like(r.product)

  def chunk(number, _):
    start = pl.multiple_of(number * p.chunk, p.chunk)
    if p.writes:
      _mix(r, p, start)
    elif p.reads:
      for rows in p.groups(ROWS):
        _add_squares(r, rows, [x_j(r.x, j, rows, start, p) for j in range(p.n)])
    if p.reads:
      r.product[...] += project(r.phi, source, start, p)
    return 0

  jax.lax.fori_loop(0, p.dim // p.chunk, chunk, 0)
  if p.reads:
    ones = jnp.ones((8, block_diagonal.LANES), jnp.bfloat16)
    total = block_diagonal.lane_sums(ones, r.squares[...])[:1]
    scale = jax.lax.rsqrt(total / (p.n * p.dim) + p.norm_eps)
    product = r.product[...].reshape(-1, p.height, p.tokens)
    z = jnp.sum(product, axis=0) * scale
    r.z[...] = z[: p.k]
    r.scale[...] = scale
    weighted_sum(read_weights(z, r, p), [source], [p.n], r.h, r, p)


def collapse(r, p):
  """The sum of the streams behind the last sub-layer, [t, d]."""
  weights = sums_of_columns(r, p)
  weighted_sum(weights, [r.x, r.y], [p.n, 1], r.h, r, p)


def sums_of_columns(r, p):
  """What each stream and the output count for in the sum: [n + 1, t]."""
  rows = r.res[...].reshape(p.n, p.n, p.tokens)
  total = jnp.sum(rows, axis=0)
  return jnp.concatenate([total, jnp.sum(r.post[...], axis=0, keepdims=True)])


def read_weights(z, r, p):
  """H_pre, [n, t]; `gate` holds alpha and the bias."""
  return jax.nn.sigmoid(z[: p.n] * r.gate[:, 0:1] + r.gate[:, 1:2])


def weighted_sum(weights, sources, counts, out, r, p):
  """out = sum over all streams of the sources, by weights [m, t]."""
  block_diagonal.spread_lanes(weights, r.spread)
  streams = [
    (source, j, count)
    for source, count in zip(sources, counts, strict=True)
    for j in range(count)
  ]

  def rows_of(number, _):
    rows = pl.ds(pl.multiple_of(number * ROWS, ROWS), ROWS)
    for start in range(0, p.dim, block_diagonal.LANES):
      lanes = pl.ds(start, block_diagonal.LANES)
      total = None
      for m, (source, j, count) in enumerate(streams):
        x = source[j, rows, lanes] if count > 1 else source[rows, lanes]
        term = r.spread[m, rows] * x.astype(jnp.float32)
        total = term if total is None else total + term
      out[rows, lanes] = total.astype(out.dtype)
    return 0

  jax.lax.fori_loop(0, p.tokens // ROWS, rows_of, 0)


def _mix(r, p, start):
  lanes = pl.ds(start, p.chunk)
  for rows in p.groups(p.group):
    mixed = mix(
      r.mix,
      [r.x[j, rows, lanes] for j in range(p.n)] + [r.y[rows, lanes]],
      rows,
      p.n,
    )
    streams = [mixed[i * p.group : (i + 1) * p.group] for i in range(p.n)]
    for i, stream in enumerate(streams):
      r.x_next[i, rows, lanes] = stream.astype(r.x_next.dtype)
    if p.reads:
      _add_squares(r, rows, streams)


def mix(matrices, slabs, rows, count):
  """B X of one group: `count` streams below each other, float32."""
  matrix = jnp.concatenate([matrices[i, rows] for i in range(count)])
  return block_diagonal.dot(matrix, block_diagonal.repeated(slabs))


def x_j(x, j, rows, start, p):
  return x[j, rows, pl.ds(start, p.chunk)].astype(jnp.float32)


def _add_squares(r, rows, streams):
  total = r.squares[rows]
  for stream in streams:
    for lane in range(0, stream.shape[1], block_diagonal.LANES):
      part = stream[:, lane : lane + block_diagonal.LANES]
      total = total + part * part
  r.squares[rows] = total


def project(phi, source, start, p):
  """phi^T x of one chunk, [parts of k, t], all streams."""
  total = None
  for j in range(p.n):
    of_stream = pl.ds(
      pl.multiple_of(j * p.dim + start, block_diagonal.LANES), p.chunk
    )
    term = block_diagonal.dot(
      phi[:, of_stream], source[j, :, pl.ds(start, p.chunk)], ((1,), (1,))
    )
    total = term if total is None else total + term
  return total
