r"""The backward pass over a tile of tokens.

With B = [res | post], X = [x; y], x' = B X and w = H_pre, from the gradients
of x', h and z (written d.) and the saved x, y, z and s = 1 / rms(x'):

    u_m = sum_c dh X_m,   dw = B u,   dl = w (1 - w) dw       first pass
    dz <- dz + alpha dl   (first n rows)
    e = -s^2 sum_k(dz_k z_k) / (n d)
    dx'_i <- dx'_i + w_i dh + e x'_i + (s dz) phi_i^T          second pass
    dX = B^T dx',   dB = dx' X^T,   dphi = (s dz) x'

(the e term is the gradient of the norm). Both passes are over channels of rows
that are on chip: x, y, dx' and dh come from HBM once and dx and dy go there
once, (3 n + 3) d numbers a token; x' is mixed again. dphi is added up over the
tiles of one core. What is added to dx' is rounded to the streams' dtype once,
as the sum.
"""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import forward


def kernel(r, p):
  if p.writes:
    coefficients = jnp.concatenate([r.res[...], r.post[...]])
    stacked = block_diagonal.columns(coefficients, 2 if p.is_bfloat16 else 3)
    block_diagonal.spread_diagonals(stacked, r.to_mix_back, r.mix_back, p.group)
    r.products[...] = jnp.zeros_like(r.products)
    if p.reads:
      block_diagonal.spread_diagonals(stacked, r.to_mix, r.mix, p.group)
  d_product = None
  if p.reads:
    d_product = _first_pass(r, p)

    @pl.when(pl.program_id(1) == 0)
    def _():
      r.dphi[...] = jnp.zeros_like(r.dphi)

  def chunk(number, _):
    start = pl.multiple_of(number * p.chunk, p.chunk)
    if p.reads:
      _add_read(r, p, d_product, start)
    if p.writes:
      _write(r, p, start)
    return 0

  jax.lax.fori_loop(0, p.dim // p.chunk, chunk, 0)
  if p.writes:
    _gather(r, p)


def collapse(r, p):
  """dx and dy of the sum, and u = d . [x; y], [n + 1, t]."""
  _dots(r, p, r.dh, forward.sums_of_columns(r, p))


def _dots(r, p, d, weights):
  """u of d, and dX = weights d."""
  r.dots[...] = jnp.zeros_like(r.dots)
  block_diagonal.spread_lanes(weights, r.spread)

  def rows_of(number, _):
    rows = pl.ds(
      pl.multiple_of(number * forward.ROWS, forward.ROWS), forward.ROWS
    )
    totals = [r.dots[m, rows] for m in range(p.n + 1)]
    for start in range(0, p.dim, block_diagonal.LANES):
      lanes = pl.ds(start, block_diagonal.LANES)
      value = d[rows, lanes].astype(jnp.float32)
      for m in range(p.n + 1):
        x = r.x[m, rows, lanes] if m < p.n else r.y[rows, lanes]
        totals[m] = totals[m] + value * x.astype(jnp.float32)
        term = (r.spread[m, rows] * value).astype(x.dtype)
        if m < p.n:
          r.dx[m, rows, lanes] = term
        else:
          r.dy[rows, lanes] = term
    for m in range(p.n + 1):
      r.dots[m, rows] = totals[m]
    return 0

  jax.lax.fori_loop(0, p.tokens // forward.ROWS, rows_of, 0)
  r.u[...] = _totals(r, p.n + 1)


def _totals(r, count):
  """The sums over lanes of `dots`: [count, t]."""
  ones = jnp.ones((8, block_diagonal.LANES), jnp.bfloat16)
  return jnp.concatenate(
    [block_diagonal.lane_sums(ones, r.dots[m])[:1] for m in range(count)]
  )


def _first_pass(r, p):
  """x' again, and what the gradient of z becomes; returns (s dz) by parts."""
  count = p.n + 1 if p.writes else p.n
  r.dots[...] = jnp.zeros_like(r.dots)

  def chunk(number, _):
    start = pl.multiple_of(number * p.chunk, p.chunk)
    lanes = pl.ds(start, p.chunk)
    for rows in p.groups(p.group):
      slabs = [r.x[j, rows, lanes] for j in range(p.n)]
      if p.writes:
        slabs.append(r.y[rows, lanes])
        mixed = forward.mix(r.mix, slabs, rows, p.n)
        for i in range(p.n):
          stream = mixed[i * p.group : (i + 1) * p.group]
          r.x_next[i, rows, lanes] = stream.astype(r.x_next.dtype)
      dh = r.dh[rows, lanes].astype(jnp.float32)
      for m, slab in enumerate(slabs):
        term = dh * slab.astype(jnp.float32)
        total = r.dots[m, rows]
        for lane in range(0, p.chunk, block_diagonal.LANES):
          total = total + term[:, lane : lane + block_diagonal.LANES]
        r.dots[m, rows] = total
    return 0

  jax.lax.fori_loop(0, p.dim // p.chunk, chunk, 0)
  dots = _totals(r, count)
  if p.writes:
    mixed = [
      sum(
        (
          r.res[i * p.n + j : i * p.n + j + 1] * dots[j : j + 1]
          for j in range(p.n)
        ),
        r.post[i : i + 1] * dots[p.n :],
      )
      for i in range(p.n)
    ]
    dots = jnp.concatenate(mixed)
  z = block_diagonal.pad_rows(r.z[...], p.height)
  weights = forward.read_weights(z, r, p)
  d_logits = dots * weights * (1 - weights)
  r.d_logits[...] = d_logits
  d_gate = block_diagonal.pad_rows(d_logits * r.gate[:, 0:1], p.height)
  dz = block_diagonal.pad_rows(r.dz[...], p.height) + d_gate
  scale = r.scale[...]
  d_norm = -scale * scale * jnp.sum(dz * z, axis=0, keepdims=True)
  block_diagonal.spread_lanes(
    jnp.concatenate([weights, d_norm / (p.n * p.dim)]), r.spread
  )
  d_product = dz * scale
  if not p.is_bfloat16:
    r.d_product[...] = d_product
    padded = block_diagonal.pad_rows(
      d_product, block_diagonal.round_up(p.height, block_diagonal.LANES)
    )
    return padded.T[:, : p.height]
  high, low = block_diagonal.parts(d_product, 2)
  r.d_product[...] = jnp.concatenate([high, low])
  high, low = high.astype(jnp.float32), low.astype(jnp.float32)
  stacked = jnp.concatenate([high, high, low])
  padded = block_diagonal.pad_rows(
    stacked, block_diagonal.round_up(len(stacked), block_diagonal.LANES)
  )
  return padded.T.astype(jnp.bfloat16)[:, : len(stacked)]


def _add_read(r, p, d_product, start):
  """Adds to dx' of one chunk what h and z give; dphi."""
  lanes = pl.ds(start, p.chunk)
  source = r.x_next if p.writes else r.x

  for i in range(p.n):
    of_stream = pl.ds(
      pl.multiple_of(i * p.dim + start, block_diagonal.LANES), p.chunk
    )
    through_z = block_diagonal.dot(d_product, r.phi[:, of_stream])
    for rows in p.groups(forward.ROWS):
      for lane in range(0, p.chunk, block_diagonal.LANES):
        there = pl.ds(
          pl.multiple_of(start + lane, block_diagonal.LANES),
          block_diagonal.LANES,
        )
        total = through_z[rows, lane : lane + block_diagonal.LANES]
        total = total + r.spread[i, rows] * r.dh[rows, there].astype(
          jnp.float32
        )
        x = source[i, rows, there].astype(jnp.float32)
        total = total + r.spread[p.n, rows] * x
        if p.writes:
          total = total + r.dx_next[i, rows, there].astype(jnp.float32)
          here = pl.ds(lane, block_diagonal.LANES)
          r.total[i, rows, here] = total.astype(r.total.dtype)
        else:
          r.dx[i, rows, there] = total.astype(r.dx.dtype)
    term = block_diagonal.dot(r.d_product[...], source[i, :, lanes])
    term = term.reshape(-1, p.height, p.chunk)
    r.dphi[:, of_stream] += jnp.sum(term, axis=0)


def _write(r, p, start):
  """dX of one chunk, and its share of dB."""
  lanes = pl.ds(start, p.chunk)

  def gradient(i, rows):
    return r.total[i, rows] if p.reads else r.dx_next[i, rows, lanes]

  for rows in p.groups(p.group):
    slabs = [gradient(i, rows) for i in range(p.n)]
    mixed = forward.mix(r.mix_back, slabs, rows, p.n + 1)
    for m in range(p.n + 1):
      part = mixed[m * p.group : (m + 1) * p.group].astype(r.dy.dtype)
      if m < p.n:
        r.dx[m, rows, lanes] = part
      else:
        r.dy[rows, lanes] = part
  for number, rows in enumerate(p.groups(p.pair)):
    slabs = [r.x[j, rows, lanes] for j in range(p.n)] + [r.y[rows, lanes]]
    r.products[number] += block_diagonal.dot(
      jnp.concatenate([gradient(i, rows) for i in range(p.n)]),
      jnp.concatenate(slabs),
      ((1,), (1,)),
    )


def _gather(r, p):
  """The diagonals of all groups: dB, [n, m, t], m rounded up."""
  for i in range(p.n):
    rows = slice(i * p.pair, (i + 1) * p.pair)
    stacked = jnp.concatenate(
      [r.products[number, rows] for number in range(p.tokens // p.pair)]
    )
    mask = block_diagonal.on_diagonal(stacked.shape, p.pair)
    r.d_mix[i] = block_diagonal.lane_sums(
      r.to_sum[...], jnp.where(mask, stacked, 0.0)
    )
