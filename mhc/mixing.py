r"""From logits to the mixing matrix H_res, one function a parameterisation.

    sinkhorn      n^2 logits       doubly stochastic up to the iteration (mHC)
    identity      none             I
    permutations  n! logits        sum_k softmax(logits)_k P_k over all
                                   permutations P_k (mHC-lite, arXiv 2601.05732)
    kronecker     2 log2(n) logits product of 2 x 2 mixtures of I and the swap
                                   (KromHC, arXiv 2601.21579)
    cyclic        n logits         sum_k softmax(logits)_k P^k, P the shift of
                                   each stream to the next (C-mHC)
    tbp           (n - 1)^2        entry by entry, each between the least and
                                   the most that leaves rows and columns to fill
                                   (transportation polytope, arXiv 2605.21724)
    go            m (m - 1) / 2    (1/s) the squares of a rotation of m = n s
                                   dimensions, summed over its s x s blocks
                                   (go-mHC, arXiv 2604.02309)
    cayley        n (n - 1) / 2    (I - S)(I + S)^-1 with S skew: a rotation
                                   (JPmHC, arXiv 2602.18308)

`permutations`, `kronecker`, `cyclic`, `tbp` and `go` are doubly stochastic
exactly, without iterating; `permutations` (Birkhoff-von Neumann) and `tbp`
reach all of the polytope, `go` the more of it the larger s is, the others part
of it. `cayley` keeps norms
instead of sums: its gains are at most sqrt(n).

Logits and matrices lie tokens-minor: [k, t] -> [n, n, t], float32.
"""

import functools
import itertools
import math
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mhc import axes
from mhc import kernels
from mhc import manifold

Mixing = Literal[
  'sinkhorn',
  'identity',
  'permutations',
  'kronecker',
  'cyclic',
  'tbp',
  'go',
  'cayley',
]
Init = Literal['mhc', 'authors']
AUTHORS = 'permutations', 'kronecker'  # whose code has a start of its own


def initial_logits(
  mixing: Mixing,
  n: int,
  diagonal: float = 6.0,
  init: Init = 'mhc',
  *,
  go_size: int = 2,
) -> Float[Array, 'k']:
  """Logits of a matrix close to I, from which training starts.

  6 I - 3 is the mHC paper's (ICML version, App. A.6); the others are chosen so
  that the diagonal starts as near to 1 (for n = 4: 0.993, 0.994, 0.995,
  0.993, 0.99, 0.994, 1).
  `diagonal` is by how much Sinkhorn's logits on the diagonal start above the
  others; at 0 all streams are averaged. `go_size` is s. The logits of `go` do
  not start at 0, where its entries, sums of squares, have no gradient.
  init='authors' is the start of the code of mHC-lite and KromHC: 0 for what
  keeps the streams, -8 for all else.

  Raises:
    ValueError: the parameterisation does not exist for n streams, or has no
      such start.
  """
  if init not in typing.get_args(Init):
    raise ValueError(
      f'init must be one of {typing.get_args(Init)}, got {init!r}'
    )
  if init == 'authors' and mixing not in AUTHORS:
    raise ValueError(
      f"init='authors' is for permutations and kronecker, got {mixing!r}: take "
      "init='mhc'"
    )
  if mixing == 'permutations' and n > 5:
    raise ValueError(f'{n} streams have {n}! permutations: use at most 5')
  if mixing == 'kronecker' and n & (n - 1):
    raise ValueError(f'kronecker needs a power of two of streams, got {n}')
  match mixing:
    case 'sinkhorn':
      return diagonal * (jnp.eye(n, dtype=jnp.float32).reshape(-1) - 0.5)
    case 'identity':
      return jnp.zeros(0, jnp.float32)
    case 'permutations':  # the first one is the identity
      kept, others = (0.0, -8.0) if init == 'authors' else (8.0, 0.0)
      logits = jnp.full(math.factorial(n), others, jnp.float32)
      return logits.at[0].set(kept)
    case 'kronecker':
      kept, others = (0.0, -8.0) if init == 'authors' else (6.0, 0.0)
      pair = jnp.array([kept, others], jnp.float32)
      return jnp.tile(pair, n.bit_length() - 1)
    case 'cyclic':  # the first one is the identity
      return jnp.zeros(n, jnp.float32).at[0].set(6.0)
    case 'tbp':
      return 5 * jnp.eye(n - 1, dtype=jnp.float32).reshape(-1)
    case 'go':
      size = n * go_size
      # H_ii is 1 - 4 c^2 s (n - 1) up to c^4.
      c = math.sqrt(0.006 / (4 * go_size * max(1, n - 1)))
      return jnp.full(size * (size - 1) // 2, c, jnp.float32)
    case 'cayley':
      return jnp.zeros(n * (n - 1) // 2, jnp.float32)


def matrices(
  mixing: Mixing,
  logits: Float[Array, 'k t'],
  n: int,
  *,
  backward: manifold.Backward = 'recompute',
  method: manifold.Method = 'sinkhorn',
  implementation: kernels.Implementation | None = None,
  go_size: int = 2,
  **options,
) -> Float[Array, 'n n t']:
  """H_res of t tokens; other options are those of `sinkhorn_project`."""
  match mixing:
    case 'sinkhorn':
      # The kernels have nothing else; then plain JAX projects.
      exact = (backward, method) == ('recompute', 'sinkhorn')
      return manifold.sinkhorn_project(
        logits.reshape(n, n, logits.shape[1]),
        backward=backward,
        method=method,
        axes=(0, 1),
        implementation=implementation if exact else None,
        **options,
      )
    case 'identity':
      eye = jnp.eye(n, dtype=jnp.float32)[..., None]
      return jnp.broadcast_to(eye, (n, n, logits.shape[1]))
    case 'permutations':
      return permutations(logits, n)
    case 'kronecker':
      return kronecker(logits, n)
    case 'cyclic':
      return cyclic(logits, n)
    case 'tbp':
      return transport(logits, n)
    case 'go':
      return go(logits, n, go_size)
    case 'cayley':
      return cayley(logits, n)


def permutations(logits: Float[Array, 'k t'], n: int) -> Float[Array, 'n n t']:
  """sum_k softmax(logits)_k P_k; P_k in lexicographic order, P_0 = I."""
  every = np.eye(n, dtype=logits.dtype)[list(itertools.permutations(range(n)))]
  weights = jax.nn.softmax(logits, axis=0)
  return jnp.einsum(
    'kij,kt->ijt', every, weights, precision=jax.lax.Precision.HIGHEST
  )


def kronecker(logits: Float[Array, 'k t'], n: int) -> Float[Array, 'n n t']:
  """U_1 x U_2 x ... with U_f = softmax(logits_f) . (I, swap)."""
  size, tokens = 1, logits.shape[1]
  # Varies as the logits do also where there are none, for one stream.
  product = axes.cast_varying(
    jnp.ones((1, 1, tokens), logits.dtype), axes.varying_axes(logits)
  )
  for pair in logits.reshape(len(logits) // 2, 2, tokens):
    keep, swap = jax.nn.softmax(pair, axis=0)
    factor = jnp.stack([jnp.stack([keep, swap]), jnp.stack([swap, keep])])
    product = product[:, None, :, None] * factor[None, :, None]
    size *= 2
    product = product.reshape(size, size, tokens)
  return product


def cyclic(logits: Float[Array, 'n t'], n: int) -> Float[Array, 'n n t']:
  """sum_k softmax(logits)_k P^k: H_ij = weight (i - j) mod n."""
  weights = jax.nn.softmax(logits, axis=0)
  shift = (np.arange(n)[:, None] - np.arange(n)) % n
  return weights[shift]


def transport(logits: Float[Array, 'k t'], n: int) -> Float[Array, 'n n t']:
  """The point of the polytope that (n - 1)^2 shares choose, row by row.

  With l what row i still needs and c_k what column k does,

      H_ij = lo + sigmoid(logit_ij) (hi - lo),
      hi = min(l, c_j),   lo = max(0, l - sum_{k > j} c_k):

  less, and later columns could not take the rest of the row. Any matrix with
  these row and column sums has H_ij in [lo, hi], so all are reached. The last
  column and row are what is left.
  """
  # Not reshaped to [n - 1, n - 1, t]: of slices [i, j] of that, XLA's gradient
  # was wrong on a CPU (jaxlib 0.11.2), by up to half of its largest entry.
  shares = jax.nn.sigmoid(logits)
  # Varies as the logits do also where there are none, for one stream.
  full = jnp.ones(logits.shape[1:], logits.dtype)
  full = axes.cast_varying(full, axes.varying_axes(logits))
  # All later entries use an entry: a compiler that fused them would compute it
  # again for each, and for what is used by those, a number of times that grows
  # exponentially (on CPUs n = 8 did not end).
  once = jax.lax.optimization_barrier
  columns, rows = [full] * n, []
  for i in range(n - 1):
    row, left = [], full
    for j in range(n - 1):
      low = jax.nn.relu(left - sum(columns[j + 1 :]))
      high = jnp.minimum(left, columns[j])
      taken = low + shares[i * (n - 1) + j] * jax.nn.relu(high - low)
      taken, left = once((taken, jax.nn.relu(left - taken)))
      row.append(taken)
    rows.append([*row, left])
    columns = once(
      [
        jax.nn.relu(column - taken)
        for column, taken in zip(columns, rows[-1], strict=True)
      ]
    )
  return jnp.stack([jnp.stack(row) for row in [*rows, columns]])


def go(
  logits: Float[Array, 'k t'], n: int, size: int = 2
) -> Float[Array, 'n n t']:
  """H_ij = (1/s) sum of the squares of block (i, j) of Q, s x s numbers each.

  Q is `cayley` of n s dimensions. Its rows and columns are of norm 1 but for
  rounding, of which the last two divisions rid the rows and columns of H.
  """
  q = cayley(logits, n * size)
  blocks = (q * q).reshape(n, size, n, size, q.shape[-1])
  h = jnp.sum(blocks, axis=(1, 3)) / size
  h = h / jnp.sum(h, axis=0, keepdims=True)
  return h / jnp.sum(h, axis=1, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def cayley(logits: Float[Array, 'k t'], n: int) -> Float[Array, 'n n t']:
  """(I - S)(I + S)^-1 = 2 X - I, S skew with the logits above its diagonal.

  X = (I + S)^-1 is found by Gauss-Jordan elimination without pivoting: the
  symmetric part of I + S is I, so every pivot is at least 1. What it loses when
  logits are large, entries having grown on the way, one step of Newton's
  iteration, X + X (I - (I + S) X), brings back: in float32 A is within 3e-6 at
  logits of standard deviation 20, where it was within 3e-4 before the step.
  """
  skew = _skew(logits, n)
  eye = jnp.eye(n, dtype=logits.dtype)[..., None]
  system = jnp.concatenate([eye + skew, eye + 0 * skew], axis=1)
  for k in range(n):
    pivot_row = system[k] / system[k, k][None]
    system = system - (system[:, k] - eye[:, k])[:, None] * pivot_row[None]
    # A compiler that computes a step again, and rounds otherwise, loses it all.
    system = jax.lax.optimization_barrier(system)
  inverse = system[:, n:]
  inverse = inverse + _product(inverse, eye - _product(eye + skew, inverse))
  return 2 * inverse - eye


@cayley.defjvp
def _cayley_jvp(n, primals, tangents):
  """dA = -2 X dS X, with X = (A + I) / 2: nothing of the elimination."""
  (logits,), (d_logits,) = primals, tangents
  out = cayley(logits, n)
  inverse = (out + jnp.eye(n, dtype=out.dtype)[..., None]) / 2
  return out, -2 * _product(inverse, _product(_skew(d_logits, n), inverse))


def _skew(logits, n):
  """The skew matrices with these entries above the diagonal."""
  empty = jnp.zeros((n, n, logits.shape[1]), logits.dtype)
  # Varies as the logits do also where there are none, for one stream.
  empty = axes.cast_varying(empty, axes.varying_axes(logits))
  if n == 1:
    return empty  # a scatter of nothing has crashed XLA (jaxlib 0.11.2)
  above = np.triu_indices(n, 1)
  upper = empty.at[above].set(logits, unique_indices=True)
  return upper - jnp.swapaxes(upper, 0, 1)


def _product(a, b):
  """a b for each token, [n, n, t], without dots, which want tokens major."""
  return jnp.sum(a[:, :, None] * b[None], axis=1)
