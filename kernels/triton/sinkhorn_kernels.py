"""The projection onto doubly stochastic matrices, one token a thread.

The n^2 entries of a token's matrix are n^2 registers of its thread, held as
tuples; the arithmetic is `mhc.kernels.xla.sinkhorn`'s. The backward kernel
keeps the divisors of SEGMENT iterations and recomputes the iterations before.
"""

import triton
import triton.language as tl


@triton.jit
def sinkhorn_forward(
  logits,
  out,
  num_tokens,
  N: tl.constexpr,
  NUM_ITERS: tl.constexpr,
  EPS: tl.constexpr,
  TOKENS: tl.constexpr,
):
  tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
  kernel, rows, columns = _start(_load(logits, tokens, num_tokens, N), N, EPS)
  rows = _row_step(kernel, rows, columns, N, EPS)
  for _iteration in range(NUM_ITERS - 1):
    columns = _column_step(kernel, rows, columns, N, EPS)
    rows = _row_step(kernel, rows, columns, N, EPS)
  matrix = _scale(kernel, rows, columns, N)
  _store(out, matrix, tokens, num_tokens, N)


@triton.jit
def sinkhorn_backward(
  logits,
  cotangent,
  out,
  num_tokens,
  N: tl.constexpr,
  NUM_ITERS: tl.constexpr,
  EPS: tl.constexpr,
  TOKENS: tl.constexpr,
  SEGMENT: tl.constexpr,
):
  tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
  kernel, rows0, columns0 = _start(_load(logits, tokens, num_tokens, N), N, EPS)
  first = _row_step(kernel, rows0, columns0, N, EPS)
  rows = first
  columns = columns0
  for _iteration in range(NUM_ITERS - 1):
    columns = _column_step(kernel, rows, columns, N, EPS)
    rows = _row_step(kernel, rows, columns, N, EPS)
  matrix = _scale(kernel, rows, columns, N)
  d_matrix = _load(cotangent, tokens, num_tokens, N)
  grad = ()
  for ij in tl.static_range(N * N):
    grad = grad + (d_matrix[ij] * matrix[ij],)
  # Segments from the last to the first; the first may be shorter.
  for segment in range((NUM_ITERS + SEGMENT - 2) // SEGMENT):
    last = NUM_ITERS - 1 - segment * SEGMENT
    before = tl.maximum(last - SEGMENT, 0)
    rows = first
    columns = columns0
    for _iteration in range(before):
      columns = _column_step(kernel, rows, columns, N, EPS)
      rows = _row_step(kernel, rows, columns, N, EPS)
    history = (rows,)
    history_columns = (columns,)
    for _step in tl.static_range(SEGMENT):
      columns = _column_step(kernel, rows, columns, N, EPS)
      rows = _row_step(kernel, rows, columns, N, EPS)
      history = history + (rows,)
      history_columns = history_columns + (columns,)
    for step in tl.static_range(SEGMENT, 0, -1):
      if before + step <= last:
        grad = _row_adjoint(
          kernel, grad, history[step], history_columns[step], N
        )
        grad = _column_adjoint(
          kernel, grad, history[step - 1], history_columns[step], N
        )
  grad = _row_adjoint(kernel, grad, first, columns0, N)
  grad = _start_adjoint(kernel, grad, rows0, columns0, N, EPS)
  _store(out, grad, tokens, num_tokens, N)


@triton.jit
def _load(matrices, tokens, num_tokens, N: tl.constexpr):
  matrix = ()
  for ij in tl.static_range(N * N):
    entry = matrices + tl.cast(ij, tl.int64) * num_tokens + tokens
    matrix = matrix + (tl.load(entry, mask=tokens < num_tokens, other=0.0),)
  return matrix


@triton.jit
def _store(matrices, matrix, tokens, num_tokens, N: tl.constexpr):
  for ij in tl.static_range(N * N):
    entry = matrices + tl.cast(ij, tl.int64) * num_tokens + tokens
    tl.store(entry, matrix[ij], mask=tokens < num_tokens)


@triton.jit
def _start(logits, N: tl.constexpr, EPS: tl.constexpr):
  """(K, r, c) after the first column step; r is where rows start from."""
  column_max = ()
  for j in tl.static_range(N):
    largest = logits[j]
    for i in tl.static_range(1, N):
      largest = tl.maximum(largest, logits[i * N + j])
    column_max = column_max + (largest,)
  kernel = ()
  rows = ()
  columns = ()
  if EPS == 0:
    row_factor = ()
    for i in tl.static_range(N):
      row_max = logits[i * N] - column_max[0]
      for j in tl.static_range(1, N):
        row_max = tl.maximum(row_max, logits[i * N + j] - column_max[j])
      row_factor = row_factor + (tl.exp(row_max),)
      rows = rows + (tl.exp(-row_max),)
      for j in tl.static_range(N):
        shifted = logits[i * N + j] - column_max[j] - row_max
        kernel = kernel + (tl.exp(shifted),)
    for j in tl.static_range(N):
      total = kernel[j] * row_factor[0]
      for i in tl.static_range(1, N):
        total += kernel[i * N + j] * row_factor[i]
      columns = columns + (total,)
  else:
    powers = ()
    for i in tl.static_range(N):
      for j in tl.static_range(N):
        powers = powers + (tl.exp(logits[i * N + j] - column_max[j]),)
    totals = ()
    for j in tl.static_range(N):
      total = powers[j]
      for i in tl.static_range(1, N):
        total += powers[i * N + j]
      totals = totals + (total,)
      rows = rows + (tl.full(total.shape, 1.0, tl.float32),)
    columns = rows
    for i in tl.static_range(N):
      for j in tl.static_range(N):
        kernel = kernel + (powers[i * N + j] / totals[j] + EPS,)
  return kernel, rows, columns


@triton.jit
def _row_step(kernel, rows, columns, N: tl.constexpr, EPS: tl.constexpr):
  """r_i <- sum_j K_ij / c_j + eps r_i."""
  inverse = _inverse(columns, N)
  out = ()
  for i in tl.static_range(N):
    total = kernel[i * N] * inverse[0]
    for j in tl.static_range(1, N):
      total += kernel[i * N + j] * inverse[j]
    if EPS > 0:  # r may have started from infinity
      total += EPS * rows[i]
    out = out + (total,)
  return out


@triton.jit
def _column_step(kernel, rows, columns, N: tl.constexpr, EPS: tl.constexpr):
  """c_j <- sum_i K_ij / r_i + eps c_j."""
  inverse = _inverse(rows, N)
  out = ()
  for j in tl.static_range(N):
    total = kernel[j] * inverse[0]
    for i in tl.static_range(1, N):
      total += kernel[i * N + j] * inverse[i]
    if EPS > 0:
      total += EPS * columns[j]
    out = out + (total,)
  return out


@triton.jit
def _inverse(divisors, N: tl.constexpr):
  out = ()
  for i in tl.static_range(N):
    out = out + (1 / divisors[i],)
  return out


@triton.jit
def _scale(kernel, rows, columns, N: tl.constexpr):
  """M_ij = K_ij / (r_i c_j)."""
  matrix = ()
  for i in tl.static_range(N):
    for j in tl.static_range(N):
      matrix = matrix + (kernel[i * N + j] / (rows[i] * columns[j]),)
  return matrix


@triton.jit
def _row_adjoint(kernel, grad, rows, columns, N: tl.constexpr):
  """Back through a row step that led to the divisors (rows, columns)."""
  inverse = _inverse(columns, N)
  out = ()
  for i in tl.static_range(N):
    total = grad[i * N]
    for j in tl.static_range(1, N):
      total += grad[i * N + j]
    total = total / rows[i]
    for j in tl.static_range(N):
      entry = grad[i * N + j] - kernel[i * N + j] * (total * inverse[j])
      out = out + (entry,)
  return out


@triton.jit
def _column_adjoint(kernel, grad, rows, columns, N: tl.constexpr):
  """Back through a column step that led to (rows, columns)."""
  inverse = _inverse(rows, N)
  totals = ()
  for j in tl.static_range(N):
    total = grad[j]
    for i in tl.static_range(1, N):
      total += grad[i * N + j]
    totals = totals + (total / columns[j],)
  out = ()
  for i in tl.static_range(N):
    for j in tl.static_range(N):
      entry = grad[i * N + j] - kernel[i * N + j] * (inverse[i] * totals[j])
      out = out + (entry,)
  return out


@triton.jit
def _start_adjoint(
  kernel, grad, rows, columns, N: tl.constexpr, EPS: tl.constexpr
):
  """Back through `_start`, to the gradient of the logits."""
  if EPS == 0:
    return _column_adjoint(kernel, grad, rows, columns, N)
  else:
    out = ()
    means = ()
    for j in tl.static_range(N):
      mean = (kernel[j] - EPS) * (grad[j] / kernel[j])
      for i in tl.static_range(1, N):
        ij = i * N + j
        mean += (kernel[ij] - EPS) * (grad[ij] / kernel[ij])
      means = means + (mean,)
    for i in tl.static_range(N):
      for j in tl.static_range(N):
        softmax = kernel[i * N + j] - EPS
        d_softmax = grad[i * N + j] / kernel[i * N + j]
        out = out + (softmax * (d_softmax - means[j]),)
    return out
