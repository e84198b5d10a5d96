r"""Backward kernels of `pre`, `post`, `advance` and `collapse`.

With x~ = [x_0 .. x_{n-1}, y] and B = [res | post], so that x' = B x~, and the
gradient g of h, [t, d]:

    d_pre_j = sum_c g_c x'_jc                                (`*_dots`)
    dx'_i  += pre_i g + s x'_i + d_raw phi_i^T               (`projection`)
    dx~_m   = sum_i B_im dx'_i
    dB_im   = sum_c dx'_ic x~_mc
    dphi_i  = sum_t x'_i d_raw

where s and d_raw need d_pre, a sum over all channels, and are made of it
outside (`streams.read_cotangents`). x' is made again and rounded as it was.

The kernels with phi run over blocks of channels: a program holds the gradient
of its rows of phi while it walks over a part of the tokens. dphi is then a sum
over the parts, dB one over the blocks; both are written once and added up
outside, in a fixed order.
"""

import triton
import triton.language as tl

from mhc.kernels.triton import phi_gradient
from mhc.kernels.triton import tiles


@triton.jit
def pre_dots(
  x,
  g,
  out,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """d_pre_j = sum_c g_c x_jc."""
  first = tl.program_id(0).to(tl.int64) * T
  sums = _zeros(N, T, C)
  for column in range(0, D, C):
    values = tiles.streams(x, first, num_tokens, column, N, D, T, C)
    wide = tiles.tile(g, first, num_tokens, column, D, T, C)
    sums = _add_products(sums, wide, values, N)
  _store_sums(out, sums, first, num_tokens, N, T)


@triton.jit
def advance_dots(
  x,
  y,
  post,
  res,
  g,
  out,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """d_pre_j = sum_c g_c x'_jc, x' rounded as h read it."""
  first = tl.program_id(0).to(tl.int64) * T
  sums = _zeros(N, T, C)
  for column in range(0, D, C):
    values = tiles.streams_and_update(
      x, y, first, num_tokens, column, N, D, T, C
    )
    wide = tiles.tile(g, first, num_tokens, column, D, T, C)
    after = ()
    for i in tl.static_range(N):
      row = tiles.row_of_mix(res, post, i, first, num_tokens, N, T)
      value = tiles.mixed(row, values, N + 1)
      value = value.to(x.dtype.element_ty).to(tl.float32)
      after = after + (value,)
    sums = _add_products(sums, wide, after, N)
  _store_sums(out, sums, first, num_tokens, N, T)


@triton.jit
def collapse_backward(
  x,
  y,
  g,
  weights,
  dx,
  dy,
  out,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """dx~_m = w_m g and sum_c g_c x~_mc."""
  first = tl.program_id(0).to(tl.int64) * T
  w = tiles.vectors(weights, 0, first, num_tokens, N + 1, T)
  sums = _zeros(N + 1, T, C)
  for column in range(0, D, C):
    values = tiles.streams_and_update(
      x, y, first, num_tokens, column, N, D, T, C
    )
    wide = tiles.tile(g, first, num_tokens, column, D, T, C)
    sums = _add_products(sums, wide, values, N + 1)
    for m in tl.static_range(N):
      value = w[m][:, None] * wide
      at = m * D + column
      tiles.store_tile(dx, value, first, num_tokens, at, N * D, T, C)
    value = w[N][:, None] * wide
    tiles.store_tile(dy, value, first, num_tokens, column, D, T, C)
  _store_sums(out, sums, first, num_tokens, N + 1, T)


@triton.jit
def post_backward(
  x,
  y,
  post,
  res,
  d_out,
  dx,
  dy,
  d_mix,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """dx, dy and dB, [n, n + 1, t], from the gradient of x'."""
  first = tl.program_id(0).to(tl.int64) * T
  dots = ()
  for _ in tl.static_range(N * (N + 1)):
    dots = dots + (tl.zeros([T], tl.float32),)
  for column in range(0, D, C):
    values = tiles.streams_and_update(
      x, y, first, num_tokens, column, N, D, T, C
    )
    grads = _zeros(N + 1, T, C)
    new = ()
    for i in tl.static_range(N):
      at = i * D + column
      total = tiles.tile(d_out, first, num_tokens, at, N * D, T, C)
      row = tiles.row_of_mix(res, post, i, first, num_tokens, N, T)
      grads = _back(grads, total, row, N)
      for m in tl.static_range(N + 1):
        dot = tl.sum(total * values[m], axis=1)
        new = new + (dots[i * (N + 1) + m] + dot,)
    dots = new
    _store_grads(grads, dx, dy, first, num_tokens, column, N, D, T, C)
  for im in tl.static_range(N * (N + 1)):
    tiles.store_vector(d_mix, dots[im], im, first, num_tokens, T)


@triton.jit
def pre_backward(
  x,
  g,
  pre,
  slope,
  d_raw,
  phi,
  dx,
  dphi,
  num_tokens: tl.constexpr,
  tokens_of_part,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """dx, and dphi^T over a part of the tokens, [parts, k, n d]."""
  column = tl.program_id(0) * C
  part = tl.program_id(1)
  phis = phi_gradient.phis(phi, column, N, D, NUM, K, C, PARTS)
  dphis = _zeros(N, K, C)
  start = part.to(tl.int64) * tokens_of_part
  stop = tl.minimum(start + tokens_of_part, num_tokens)
  for first in range(start, stop, T):
    d_raws = phi_gradient.d_raws(
      d_raw, first, num_tokens, x.dtype.element_ty, NUM, K, PARTS, T
    )
    s = tiles.vector(slope, 0, first, num_tokens, T)
    wide = tiles.tile(g, first, num_tokens, column, D, T, C)
    new = ()
    for i in tl.static_range(N):
      at = i * D + column
      value = tiles.tile(x, first, num_tokens, at, N * D, T, C)
      weight = tiles.vector(pre, i, first, num_tokens, T)
      total = phi_gradient.total(
        value, wide, weight, s, d_raws, phis, d_raw, i, N, K, PARTS, T, C
      )
      tiles.store_tile(dx, total, first, num_tokens, at, N * D, T, C)
      value = value.to(x.dtype.element_ty)
      new = new + (phi_gradient.d_phi(dphis[i], d_raws, value, PARTS),)
    dphis = new
  phi_gradient.store_phis(dphi, dphis, part, column, N, D, NUM, K, C)


@triton.jit
def advance_backward(
  x,
  y,
  post,
  res,
  d_out,
  g,
  pre,
  slope,
  d_raw,
  phi,
  dx,
  dy,
  d_mix,
  dphi,
  num_tokens: tl.constexpr,
  tokens_of_part,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
  MIX: tl.constexpr,
):
  """dx, dy, dB of these channels, [d / C, t, n (n + 1)], and dphi^T."""
  block = tl.program_id(0).to(tl.int64)
  column = tl.program_id(0) * C
  part = tl.program_id(1)
  phis = phi_gradient.phis(phi, column, N, D, NUM, K, C, PARTS)
  dphis = _zeros(N, K, C)
  start = part.to(tl.int64) * tokens_of_part
  stop = tl.minimum(start + tokens_of_part, num_tokens)
  for first in range(start, stop, T):
    d_raws = phi_gradient.d_raws(
      d_raw, first, num_tokens, x.dtype.element_ty, NUM, K, PARTS, T
    )
    s = tiles.vector(slope, 0, first, num_tokens, T)
    values = tiles.streams_and_update(
      x, y, first, num_tokens, column, N, D, T, C
    )
    totals = tiles.streams(d_out, first, num_tokens, column, N, D, T, C)
    wide = tiles.tile(g, first, num_tokens, column, D, T, C)
    grads = _zeros(N + 1, T, C)
    entries = tl.arange(0, MIX)
    dots = tl.zeros([T, MIX], tl.float32)
    new = ()
    for i in tl.static_range(N):
      row = tiles.row_of_mix(res, post, i, first, num_tokens, N, T)
      rounded = tiles.mixed(row, values, N + 1)
      rounded = tiles.pinned(rounded.to(x.dtype.element_ty))
      new = new + (phi_gradient.d_phi(dphis[i], d_raws, rounded, PARTS),)
      value = rounded.to(tl.float32)
      weight = tiles.vector(pre, i, first, num_tokens, T)
      total = totals[i] + phi_gradient.total(
        value, wide, weight, s, d_raws, phis, d_raw, i, N, K, PARTS, T, C
      )
      grads = _back(grads, total, row, N)
      for m in tl.static_range(N + 1):
        dot = tl.sum(total * values[m], axis=1)[:, None]
        dots = tl.where(entries[None, :] == i * (N + 1) + m, dot, dots)
    dphis = new
    rows = block * num_tokens + first + tl.arange(0, T)
    mask = (first + tl.arange(0, T) < num_tokens)[:, None]
    mask &= (entries < N * (N + 1))[None, :]
    d_mixes = d_mix + rows[:, None] * (N * (N + 1)) + entries[None, :]
    tl.store(d_mixes, dots, mask=mask)
    _store_grads(grads, dx, dy, first, num_tokens, column, N, D, T, C)
  phi_gradient.store_phis(dphi, dphis, part, column, N, D, NUM, K, C)


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
  out = ()
  for _ in tl.static_range(COUNT):
    out = out + (tl.zeros([ROWS, COLUMNS], tl.float32),)
  return out


@triton.jit
def _add_products(sums, wide, values, COUNT: tl.constexpr):
  out = ()
  for m in tl.static_range(COUNT):
    out = out + (sums[m] + wide * values[m],)
  return out


@triton.jit
def _store_sums(
  out,
  sums,
  first,
  num_tokens: tl.constexpr,
  COUNT: tl.constexpr,
  T: tl.constexpr,
):
  for m in tl.static_range(COUNT):
    total = tl.sum(sums[m], axis=1)
    tiles.store_vector(out, total, m, first, num_tokens, T)


@triton.jit
def _back(grads, total, row, N: tl.constexpr):
  """dx~_m + B_im dx'_i."""
  out = ()
  for m in tl.static_range(N + 1):
    out = out + (grads[m] + row[m][:, None] * total,)
  return out


@triton.jit
def _store_grads(
  grads,
  dx,
  dy,
  first,
  num_tokens: tl.constexpr,
  column,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  for m in tl.static_range(N):
    at = m * D + column
    tiles.store_tile(dx, grads[m], first, num_tokens, at, N * D, T, C)
  tiles.store_tile(dy, grads[N], first, num_tokens, column, D, T, C)
