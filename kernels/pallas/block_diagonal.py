r"""Mixing the streams of each token on a matrix unit.

A token's mixing matrix is tiny, n x (n + 1), and each token has its own, which
a matrix unit does not take. Over a group of g tokens it does: with the rows of
the streams stacked stream by stream, X = [x_0; ...; x_n-1; y] of (n + 1) g
rows, and each coefficient scattered to a diagonal,

    B[(i, t), (m, t')] = b_im[t]  if t = t', else 0,

the product B X is every token's mixture; B^T mixes back, and the diagonals of
D X^T are the gradient of the coefficients.

The unit multiplies bfloat16 and adds float32. bfloat16 streams enter as they
are; what is float32 is split into bfloat16 parts, each exact, the first two
(2^-17) for mixing. The parts stand side by side in B, against rows of X that
are repeated. float32 streams are multiplied at the highest precision.

Coefficients lie tokens-minor, [m, t], one row each, wherever they are stored.
`sizes` is the kernel's `specs.Sizes`.
"""

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128


def round_up(number, multiple):
  return -(-number // multiple) * multiple


def row_slices(count, size):
  """Returns the slices that cut `count` rows into groups of `size`."""
  return [slice(start, start + size) for start in range(0, count, size)]


def split_bf16(x, count):
  """Splits float32 x into bfloat16 arrays that add up to it."""
  result = []
  for _ in range(count - 1):
    high = x.astype(jnp.bfloat16)
    result.append(high)
    x = x - high.astype(jnp.float32)
  return [*result, x.astype(jnp.bfloat16)]


def dot(a, b, sizes, contract=((1,), (0,))):
  """Product with float32 sums, exact in bfloat16, HIGHEST in float32."""
  precision = None
  if a.dtype == jnp.float32:
    precision = jax.lax.Precision.HIGHEST
  elif sizes.interpret:  # no bfloat16 unit; float32 products are as exact
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jax.lax.dot_general(
    a,
    b,
    (contract, ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def lane_sums(select, x, sizes):
  """Sums x, [t, l], over lanes that `select`, [m, l], marks: [m, t]."""
  terms = [dot(select, part, sizes, ((1,), (1,))) for part in split_bf16(x, 3)]
  return terms[0] + terms[1] + terms[2]


def pad_rows(x, rows):
  if len(x) == rows:
    return x
  return jnp.concatenate([x, jnp.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def transpose_split(rows, count):
  """[m, t] -> [t, l]: coefficients by parts, `round_up(m, 8)` lanes each."""
  height = round_up(len(rows), 8)
  stacked = [
    pad_rows(part.astype(jnp.float32), height)
    for part in split_bf16(rows, count)
  ]
  stacked = jnp.concatenate(stacked)
  stacked = pad_rows(stacked, round_up(len(stacked), LANES))
  return stacked.T.astype(jnp.bfloat16)


def broadcast_to_lanes(rows, out, sizes):
  """Writes [m, t] into out, [m, t, 128]: each coefficient on all lanes."""
  height = round_up(len(rows), 8)
  stacked = transpose_split(rows, 3)
  lane = jax.lax.broadcasted_iota(jnp.int32, stacked.shape, 1)
  lane = jax.lax.rem(lane, jnp.int32(height))
  ones = jnp.ones((stacked.shape[1], LANES), jnp.bfloat16)
  for m in range(len(rows)):
    selected = jnp.where(lane == m, stacked, jnp.zeros_like(stacked))
    out[m] = dot(selected, ones, sizes)


def scatter_constants(index, group, dtype):
  """Returns the constants by which coefficients are scattered to diagonals.

  Args:
    index: [i, m], the row of the coefficient b_im.
    group: g.
    dtype: of the streams.

  Returns:
    [i, l, p m g]: for each i, ones from a coefficient's lane of
    `transpose_split` to its lanes of B; the p = 2 parts apart for bfloat16, in
    one for float32.
  """
  count, apart = (2, 2) if dtype == jnp.bfloat16 else (3, 1)
  height = round_up(index.size, 8)
  size, width = index.shape
  result = np.zeros(
    (size, round_up(count * height, LANES), apart, width, group)
  )
  for part in range(count):
    for i, m in np.ndindex(size, width):
      result[i, part * height + index[i, m], part % apart, m] = 1
  result = result.reshape(size, -1, apart * width * group)
  return result.astype(jnp.bfloat16)


def scatter_to_diagonals(stacked, constants, out, sizes):
  """Writes B of every group into out, [i, t, l], rows of one i together."""
  for i in range(len(constants)):
    values = dot(stacked, constants[i], sizes)
    mask = on_diagonal(values.shape, sizes.fwd_group)
    out[i] = jnp.where(mask, values, 0.0).astype(out.dtype)


def on_diagonal(shape, group):
  """Marks where row and lane are the same token of their groups."""
  row, lane = (
    jax.lax.rem(
      jax.lax.broadcasted_iota(jnp.int32, shape, axis), jnp.int32(group)
    )
    for axis in (0, 1)
  )
  return row == lane


def mix(matrices, rows, stream_rows, count, sizes):
  """B X of one group: `count` streams below each other, float32.

  Args:
    matrices: a reference to B, as `scatter_to_diagonals` writes it.
    rows: the group's, a slice.
    stream_rows: the group's rows of each stream.
    count: streams of the result.
    sizes: of the call.
  """
  matrix = jnp.concatenate([matrices[i, rows] for i in range(count)])
  return dot(matrix, repeat_for_split(stream_rows), sizes)


def repeat_for_split(stream_rows):
  """Stacks the rows of a group as B takes them: bfloat16 ones twice."""
  times = 2 if stream_rows[0].dtype == jnp.bfloat16 else 1
  return jnp.concatenate(times * stream_rows)
