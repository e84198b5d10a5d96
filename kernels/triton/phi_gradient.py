"""The projection's part of the backward kernels: gradients through phi."""

import triton
import triton.language as tl

from mhc.kernels.triton import tiles


@triton.jit
def phis(
  phi,
  column,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
  PARTS: tl.constexpr,
):
  """phi^T, [K, C], of each stream; of three parts the first two."""
  out = ()
  for part in tl.static_range((PARTS + 1) // 2):
    for i in tl.static_range(N):
      at = i * D + column
      weight = tiles.weights_of_phi(phi, part, at, N * D, NUM, K, C)
      out = out + (weight,)
  return out


@triton.jit
def d_raws(
  d_raw,
  first,
  num_tokens: tl.constexpr,
  DTYPE: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
):
  """The gradient of x' phi, [K, T]: for bfloat16 two parts, right to 2^-18."""
  tokens = first + tl.arange(0, T)
  numbers = tl.arange(0, K)
  entries = d_raw + numbers[:, None] * num_tokens
  mask = (numbers < NUM)[:, None] & (tokens < num_tokens)[None, :]
  value = tl.load(entries + tokens[None, :], mask=mask, other=0.0)
  out = ()
  for _ in tl.static_range((PARTS + 1) // 2):
    rounded = value.to(DTYPE)
    out = out + (rounded,)
    value -= rounded.to(tl.float32)
  return out


@triton.jit
def total(
  value,
  wide,
  weight,
  s,
  d_raws,
  phis,
  source,
  i: tl.constexpr,
  N: tl.constexpr,
  K: tl.constexpr,
  PARTS: tl.constexpr,
  T: tl.constexpr,
  C: tl.constexpr,
):
  """pre_i g + s x'_i + d_raw phi_i^T.

  Of bfloat16 streams the result is rounded to bfloat16, so that two parts of
  either factor, and three products, are enough: they are right to 2^-16.
  """
  product = tl.zeros([T, C], tl.float32)
  for p in tl.static_range((PARTS + 1) // 2):
    for q in tl.static_range((PARTS + 1) // 2 - p):
      left = tl.trans(d_raws[p])
      product = tl.dot(left, phis[q * N + i], product, input_precision='ieee')
  product = tiles.as_loaded(product, source, weight > 2, T, C)
  return weight[:, None] * wide + s[:, None] * value + product


@triton.jit
def d_phi(total, d_raws, value, PARTS: tl.constexpr):
  """total + d_raw^T x'_i, [K, C]."""
  for part in tl.static_range((PARTS + 1) // 2):
    total = tl.dot(d_raws[part], value, total, input_precision='ieee')
  return total


@triton.jit
def store_phis(
  dphi,
  dphis,
  part,
  column,
  N: tl.constexpr,
  D: tl.constexpr,
  NUM: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
):
  offsets = tl.arange(0, K)[:, None] * (N * D) + tl.arange(0, C)[None, :]
  mask = (tl.arange(0, K) < NUM)[:, None]
  for i in tl.static_range(N):
    start = dphi + part * (NUM * N * D) + i * D + column
    tl.store(start + offsets, dphis[i], mask=mask)
