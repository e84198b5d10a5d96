"""Forward kernels of `pre`, `post`, `advance` and `collapse`.

`pre` and `advance` need z, a sum over all channels, before they can read h. A
tile of n d numbers a token does not fit on chip next to a phi that is worth
loading for so few tokens, so that a second loop reads the streams of the tile
again: backwards, so that what L2 still holds comes first.
"""

import triton
import triton.language as tl

from mhc.kernels.triton import tiles


@triton.jit
def pre_forward(
  x,
  phi,
  alpha,
  bias,
  h,
  z,
  scale,
  num_tokens: tl.constexpr,
  norm_eps: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """h, z and 1 / rms of the streams x."""
  first = tl.program_id(0).to(tl.int64) * T
  raw = tl.zeros([T, K], tl.float32)
  squares = tl.zeros([T, C], tl.float32)
  for column in range(0, D, C):
    for i in tl.static_range(N):
      at = i * D + column
      value = tiles.tile(x, first, num_tokens, at, N * D, T, C)
      squares += value * value
      value = value.to(x.dtype.element_ty)
      raw = tiles.project(raw, value, phi, at, N * D, NUM, K, C, PARTS)
  weights = _finish(
    raw,
    squares,
    alpha,
    bias,
    z,
    scale,
    first,
    num_tokens,
    norm_eps,
    N,
    D,
    NUM,
    K,
    T,
  )
  _read(x, weights, h, first, num_tokens, N, D, T, C)


@triton.jit
def advance_forward(
  x,
  y,
  post,
  res,
  phi,
  alpha,
  bias,
  out,
  h,
  z,
  scale,
  num_tokens: tl.constexpr,
  norm_eps: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """x' = res x + post y; h, z and 1 / rms of x'."""
  first = tl.program_id(0).to(tl.int64) * T
  raw = tl.zeros([T, K], tl.float32)
  squares = tl.zeros([T, C], tl.float32)
  for column in range(0, D, C):
    values = tiles.streams_and_update(
      x, y, first, num_tokens, column, N, D, T, C
    )
    for i in tl.static_range(N):
      at = i * D + column
      row = tiles.row_of_mix(res, post, i, first, num_tokens, N, T)
      value = tiles.mixed(row, values, N + 1)
      value = tiles.pinned(value.to(x.dtype.element_ty))
      tiles.store_tile(out, value, first, num_tokens, at, N * D, T, C)
      wide = value.to(tl.float32)
      squares += wide * wide
      raw = tiles.project(raw, value, phi, at, N * D, NUM, K, C, PARTS)
  weights = _finish(
    raw,
    squares,
    alpha,
    bias,
    z,
    scale,
    first,
    num_tokens,
    norm_eps,
    N,
    D,
    NUM,
    K,
    T,
  )
  tl.debug_barrier()  # x' was written by other threads of this program
  _read(out, weights, h, first, num_tokens, N, D, T, C)


@triton.jit
def post_forward(
  x,
  y,
  post,
  res,
  out,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """x' = res x + post y."""
  first = tl.program_id(0).to(tl.int64) * T
  column = tl.program_id(1) * C
  values = tiles.streams_and_update(x, y, first, num_tokens, column, N, D, T, C)
  for i in tl.static_range(N):
    at = i * D + column
    row = tiles.row_of_mix(res, post, i, first, num_tokens, N, T)
    value = tiles.mixed(row, values, N + 1)
    tiles.store_tile(out, value, first, num_tokens, at, N * D, T, C)


@triton.jit
def collapse_forward(
  x,
  y,
  weights,
  out,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """sum_j w_j x_j + w_n y."""
  first = tl.program_id(0).to(tl.int64) * T
  column = tl.program_id(1) * C
  rows = tiles.vectors(weights, 0, first, num_tokens, N + 1, T)
  values = tiles.streams_and_update(x, y, first, num_tokens, column, N, D, T, C)
  total = tiles.mixed(rows, values, N + 1)
  tiles.store_tile(out, total, first, num_tokens, column, D, T, C)


@triton.jit
def _finish(
  raw,
  squares,
  alpha,
  bias,
  z,
  scale,
  first,
  num_tokens: tl.constexpr,
  norm_eps: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  T: tl.constexpr,
):
  """Stores z and 1 / rms; returns sigmoid(alpha z_j + bias_j), j < n."""
  mean_square = tl.sum(squares, axis=1) / (N * D)
  inverse = 1 / tl.sqrt_rn(mean_square + norm_eps)
  tiles.store_vector(scale, inverse, 0, first, num_tokens, T)
  normed = raw * inverse[:, None]
  tokens = first + tl.arange(0, T)
  numbers = tl.arange(0, K)
  entries = z + numbers[None, :] * num_tokens
  mask = (tokens < num_tokens)[:, None] & (numbers < NUM)[None, :]
  tl.store(entries + tokens[:, None], normed, mask=mask)
  weights = ()
  for j in tl.static_range(N):
    z_j = tl.sum(tl.where(numbers[None, :] == j, normed, 0.0), axis=1)
    logit = tl.load(alpha) * z_j + tl.load(bias + j)
    weights = weights + (tl.sigmoid(logit),)
  return weights


@triton.jit
def _read(
  x,
  weights,
  h,
  first,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """h = sum_j w_j x_j, from the last channels to the first."""
  for step in range(0, D, C):
    column = D - C - step
    values = tiles.streams(x, first, num_tokens, column, N, D, T, C)
    total = tiles.mixed(weights, values, N)
    tiles.store_tile(h, total, first, num_tokens, column, D, T, C)
