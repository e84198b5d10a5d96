"""Functions that the kernels of streams share, on tiles of [tokens, channels].

A program holds the n streams of a tile as a tuple of n float32 tensors. `T` and
`C` are the tokens and channels of a tile, `K` the numbers of the projection
filled up to a power of two.

Products with phi are those of float32: where streams are bfloat16, phi comes as
three bfloat16 parts that add up to it, so that each product is exact and sums
are float32; where streams are float32, in one part and 'ieee' precision.
"""

import triton
import triton.language as tl


@triton.jit
def vector(source, row, first, num_tokens: tl.constexpr, T: tl.constexpr):
  """source[row, first:] of a mapping [., t], zero behind t."""
  start = source + row * num_tokens + first
  mask = first + tl.arange(0, T) < num_tokens
  return tl.load(start + tl.arange(0, T), mask=mask, other=0.0)


@triton.jit
def vectors(
  source,
  row,
  first,
  num_tokens: tl.constexpr,
  COUNT: tl.constexpr,
  T: tl.constexpr,
):
  """`vector` of COUNT rows from `row` on."""
  out = ()
  for number in tl.static_range(COUNT):
    out = out + (vector(source, row + number, first, num_tokens, T),)
  return out


@triton.jit
def store_vector(
  out, value, row, first, num_tokens: tl.constexpr, T: tl.constexpr
):
  start = out + row * num_tokens + first
  mask = first + tl.arange(0, T) < num_tokens
  tl.store(start + tl.arange(0, T), value, mask=mask)


@triton.jit
def tile(
  source,
  first,
  num_tokens: tl.constexpr,
  column,
  ROW: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """source[first:, column:] of a [t, ROW] array, float32, zero behind t."""
  start = source + tl.cast(first, tl.int64) * ROW + column
  offsets = tl.arange(0, T)[:, None] * ROW + tl.arange(0, C)[None, :]
  mask = (first + tl.arange(0, T) < num_tokens)[:, None]
  return tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
  out,
  value,
  first,
  num_tokens: tl.constexpr,
  column,
  ROW: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  start = out + tl.cast(first, tl.int64) * ROW + column
  offsets = tl.arange(0, T)[:, None] * ROW + tl.arange(0, C)[None, :]
  mask = (first + tl.arange(0, T) < num_tokens)[:, None]
  tl.store(start + offsets, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def streams(
  x,
  first,
  num_tokens: tl.constexpr,
  column,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """The n streams of a tile."""
  out = ()
  for j in tl.static_range(N):
    value = tile(x, first, num_tokens, j * D + column, N * D, T, C)
    out = out + (value,)
  return out


@triton.jit
def mixed(weights, values, COUNT: tl.constexpr):
  """sum_m weights_m values_m."""
  total = weights[0][:, None] * values[0]
  for m in tl.static_range(1, COUNT):
    total += weights[m][:, None] * values[m]
  return total


@triton.jit
def row_of_mix(
  res,
  post,
  i,
  first,
  num_tokens: tl.constexpr,
  N: tl.constexpr,
  T: tl.constexpr,
):
  """B_i = [res_i0 .. res_in-1, post_i]."""
  out = vectors(res, i * N, first, num_tokens, N, T)
  return out + (vector(post, i, first, num_tokens, T),)


@triton.jit
def streams_and_update(
  x,
  y,
  first,
  num_tokens: tl.constexpr,
  column,
  N: tl.constexpr,
  D: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """x~ of a tile: the n streams and y."""
  out = streams(x, first, num_tokens, column, N, D, T, C)
  return out + (tile(y, first, num_tokens, column, D, T, C),)


@triton.jit
def weights_of_phi(
  phi,
  part,
  column,
  ROW: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
):
  """Columns of phi^T, [K, C], of parts [., NUM, ROW]."""
  start = phi + part * (NUM * ROW) + column
  offsets = tl.arange(0, K)[:, None] * ROW + tl.arange(0, C)[None, :]
  mask = (tl.arange(0, K) < NUM)[:, None]
  return tl.load(start + offsets, mask=mask, other=0.0)


@triton.jit
def project(
  total,
  value,
  phi,
  column,
  ROW: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
  PARTS: tl.constexpr,
):
  """total + x_i phi_i, [T, K]."""
  for part in tl.static_range(PARTS):
    weight = weights_of_phi(phi, part, column, ROW, NUM, K, C)
    total = tl.dot(value, tl.trans(weight), total, input_precision='ieee')
  return total


@triton.jit
def pinned(value):
  """`value`, made once: not again in each layout that a product wants it in.

  Without this the compiler mixes the streams a second time, in the layout of
  an operand, at the price of a multiple of the registers.
  """
  if value.dtype == tl.bfloat16:
    return tl.inline_asm_elementwise(
      'mov.b32 $0, $1;', '=r,r', [value], value.dtype, False, 2
    )
  else:
    return tl.inline_asm_elementwise(
      'mov.b32 $0, $1;', '=r,r', [value], value.dtype, False, 1
    )


@triton.jit
def as_loaded(value, source, never, T: tl.constexpr, C: tl.constexpr):
  """`value`, laid out over threads as tiles are that come from memory.

  A product leaves its result spread over the warps in rows of 8 columns. The
  compiler would keep that for all that follows, so that each of the n (n + 1)
  sums over channels has to cross warps. A load that happens nowhere and gives
  `value` instead brings it back, once.
  """
  offsets = tl.arange(0, T)[:, None] * C + tl.arange(0, C)[None, :]
  return tl.load(source + offsets, mask=never[:, None], other=value)
