r"""The backward pass over a tile of tokens.

With B = [res | post], X = [x; y], x' = B X, rounded as the forward pass writes
it, and w = H_pre, from the gradients of x', h and z (written d.) and the saved
x, y, z and s = 1 / rms(x'):

    dw_i = sum_c dh x'_i,   dl = w (1 - w) dw                 first pass
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


def kernel(refs, sizes):
  """The gradients of `forward.kernel`."""
  if sizes.writes:
    stacked = forward.stacked_coefficients(refs, sizes)
    block_diagonal.scatter_to_diagonals(
      stacked, refs.to_mix_back, refs.mix_back, sizes
    )
    refs.products[...] = jnp.zeros_like(refs.products)
    if sizes.reads:
      block_diagonal.scatter_to_diagonals(stacked, refs.to_mix, refs.mix, sizes)
  d_product = None
  if sizes.reads:
    d_product = _first_pass(refs, sizes)

    @pl.when(pl.program_id(1) == 0)
    def _():
      refs.dphi[...] = jnp.zeros_like(refs.dphi)

  def step(number, _):
    start = pl.multiple_of(number * sizes.channel_block, sizes.channel_block)
    if sizes.reads:
      _add_read(refs, sizes, d_product, start)
    if sizes.writes:
      _write(refs, sizes, start)
    return 0

  jax.lax.fori_loop(0, sizes.dim // sizes.channel_block, step, 0)
  if sizes.writes:
    _gather(refs, sizes)


def collapse(refs, sizes):
  """dx and dy of the sum, and u = dh . [x; y], [n + 1, t]."""
  n = sizes.n
  weights = forward.collapse_weights(refs, sizes)
  refs.dots[...] = jnp.zeros_like(refs.dots)
  block_diagonal.broadcast_to_lanes(weights, refs.spread, sizes)

  def rows_of(number, _):
    rows = pl.ds(
      pl.multiple_of(number * forward.ROWS, forward.ROWS), forward.ROWS
    )
    totals = [refs.dots[m, rows] for m in range(n + 1)]
    for start in range(0, sizes.dim, block_diagonal.LANES):
      lanes = pl.ds(start, block_diagonal.LANES)
      dh = refs.dh[rows, lanes].astype(jnp.float32)
      for m in range(n + 1):
        x = refs.x[m, rows, lanes] if m < n else refs.y[rows, lanes]
        totals[m] = totals[m] + dh * x.astype(jnp.float32)
        term = (refs.spread[m, rows] * dh).astype(x.dtype)
        if m < n:
          refs.dx[m, rows, lanes] = term
        else:
          refs.dy[rows, lanes] = term
    for m in range(n + 1):
      refs.dots[m, rows] = totals[m]
    return 0

  jax.lax.fori_loop(0, sizes.tokens // forward.ROWS, rows_of, 0)
  refs.u[...] = _sum_dots(refs, sizes, n + 1)


def _first_pass(refs, sizes):
  """Mixes x' again and writes dl; returns (s dz)^T by parts, [t, p k].

  `spread` gets what dx' is made of: w, and the factor e of x'.
  """
  refs.dots[...] = jnp.zeros_like(refs.dots)
  jax.lax.fori_loop(
    0,
    sizes.dim // sizes.channel_block,
    lambda number, _: _dots_of_block(refs, sizes, number),
    0,
  )
  dots = _sum_dots(refs, sizes, sizes.n)
  z = block_diagonal.pad_rows(refs.z[...], sizes.padded_rows)
  weights = forward.read_weights(z, refs, sizes)
  d_logits = dots * weights * (1 - weights)
  refs.d_logits[...] = d_logits
  d_gate = block_diagonal.pad_rows(
    d_logits * refs.gate[:, 0:1], sizes.padded_rows
  )
  dz = block_diagonal.pad_rows(refs.dz[...], sizes.padded_rows) + d_gate
  scale = refs.scale[...]
  d_norm = -scale * scale * jnp.sum(dz * z, axis=0, keepdims=True)
  block_diagonal.broadcast_to_lanes(
    jnp.concatenate([weights, d_norm / (sizes.n * sizes.dim)]),
    refs.spread,
    sizes,
  )
  return _split_product(refs, sizes, dz * scale)


def _dots_of_block(refs, sizes, number):
  """Mixes x' of one block of channels again, and adds dh . x' to dots."""
  start = pl.multiple_of(number * sizes.channel_block, sizes.channel_block)
  lanes = pl.ds(start, sizes.channel_block)
  group = sizes.fwd_group
  for rows in block_diagonal.row_slices(sizes.tokens, group):
    stream_rows = [refs.x[j, rows, lanes] for j in range(sizes.n)]
    if sizes.writes:
      stream_rows.append(refs.y[rows, lanes])
      mixed = block_diagonal.mix(refs.mix, rows, stream_rows, sizes.n, sizes)
      # Rounded, as h has read them.
      stream_rows = [
        mixed[i * group : (i + 1) * group].astype(refs.x_next.dtype)
        for i in range(sizes.n)
      ]
      for i, stream in enumerate(stream_rows):
        refs.x_next[i, rows, lanes] = stream
    dh = refs.dh[rows, lanes].astype(jnp.float32)
    for m, x in enumerate(stream_rows):
      term = dh * x.astype(jnp.float32)
      total = refs.dots[m, rows]
      for lane in range(0, sizes.channel_block, block_diagonal.LANES):
        total = total + term[:, lane : lane + block_diagonal.LANES]
      refs.dots[m, rows] = total
  return 0


def _sum_dots(refs, sizes, count):
  """Returns the sums over lanes of `dots`: [count, t]."""
  ones = jnp.ones((8, block_diagonal.LANES), jnp.bfloat16)
  return jnp.concatenate(
    [
      block_diagonal.lane_sums(ones, refs.dots[m], sizes)[:1]
      for m in range(count)
    ]
  )


def _split_product(refs, sizes, d_product):
  """Writes s dz, [k, t], for dphi; returns its transpose, for dx'.

  Both by bfloat16 parts for bfloat16 streams; those of the transpose, high,
  high and low, meet phi's high, low and high.
  """
  if not sizes.is_bfloat16:
    refs.d_product[...] = d_product
    padded = block_diagonal.pad_rows(
      d_product,
      block_diagonal.round_up(sizes.padded_rows, block_diagonal.LANES),
    )
    return padded.T[:, : sizes.padded_rows]
  high, low = block_diagonal.split_bf16(d_product, 2)
  refs.d_product[...] = jnp.concatenate([high, low])
  high, low = high.astype(jnp.float32), low.astype(jnp.float32)
  stacked = jnp.concatenate([high, high, low])
  padded = block_diagonal.pad_rows(
    stacked, block_diagonal.round_up(len(stacked), block_diagonal.LANES)
  )
  return padded.T.astype(jnp.bfloat16)[:, : len(stacked)]


def _add_read(refs, sizes, d_product, start):
  """Adds to dx' of one block of channels what h and z give; adds to dphi."""
  lanes = pl.ds(start, sizes.channel_block)
  source = refs.x_next if sizes.writes else refs.x

  for i in range(sizes.n):
    of_stream = pl.ds(
      pl.multiple_of(i * sizes.dim + start, block_diagonal.LANES),
      sizes.channel_block,
    )
    through_z = block_diagonal.dot(d_product, refs.phi[:, of_stream], sizes)
    for rows in block_diagonal.row_slices(sizes.tokens, forward.ROWS):
      for lane in range(0, sizes.channel_block, block_diagonal.LANES):
        there = pl.ds(
          pl.multiple_of(start + lane, block_diagonal.LANES),
          block_diagonal.LANES,
        )
        total = through_z[rows, lane : lane + block_diagonal.LANES]
        total = total + refs.spread[i, rows] * refs.dh[rows, there].astype(
          jnp.float32
        )
        x = source[i, rows, there].astype(jnp.float32)
        total = total + refs.spread[sizes.n, rows] * x
        if sizes.writes:
          total = total + refs.dx_next[i, rows, there].astype(jnp.float32)
          here = pl.ds(lane, block_diagonal.LANES)
          refs.total[i, rows, here] = total.astype(refs.total.dtype)
        else:
          refs.dx[i, rows, there] = total.astype(refs.dx.dtype)
    term = block_diagonal.dot(refs.d_product[...], source[i, :, lanes], sizes)
    term = term.reshape(-1, sizes.padded_rows, sizes.channel_block)
    refs.dphi[:, of_stream] += jnp.sum(term, axis=0)


def _write(refs, sizes, start):
  """Writes dX of one block of channels, and adds its share to dB."""
  n = sizes.n
  lanes = pl.ds(start, sizes.channel_block)

  def gradients(rows):
    if sizes.reads:
      return [refs.total[i, rows] for i in range(n)]
    return [refs.dx_next[i, rows, lanes] for i in range(n)]

  group = sizes.fwd_group
  for rows in block_diagonal.row_slices(sizes.tokens, group):
    mixed = block_diagonal.mix(
      refs.mix_back, rows, gradients(rows), n + 1, sizes
    )
    for m in range(n + 1):
      part = mixed[m * group : (m + 1) * group].astype(refs.dy.dtype)
      if m < n:
        refs.dx[m, rows, lanes] = part
      else:
        refs.dy[rows, lanes] = part
  groups = block_diagonal.row_slices(sizes.tokens, sizes.bwd_group)
  for number, rows in enumerate(groups):
    stream_rows = [refs.x[j, rows, lanes] for j in range(n)]
    stream_rows.append(refs.y[rows, lanes])
    refs.products[number] += block_diagonal.dot(
      jnp.concatenate(gradients(rows)),
      jnp.concatenate(stream_rows),
      sizes,
      ((1,), (1,)),
    )


def _gather(refs, sizes):
  """Writes dB, [n, m, t], m rounded up: the diagonals of all groups."""
  group = sizes.bwd_group
  for i in range(sizes.n):
    rows = slice(i * group, (i + 1) * group)
    stacked = jnp.concatenate(
      [refs.products[number, rows] for number in range(sizes.tokens // group)]
    )
    mask = block_diagonal.on_diagonal(stacked.shape, group)
    refs.d_mix[i] = block_diagonal.lane_sums(
      refs.to_sum[...], jnp.where(mask, stacked, 0.0), sizes
    )
