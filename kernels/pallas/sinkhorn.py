"""The projection onto doubly stochastic matrices as a TPU kernel.

A block is 1,024 tokens, so that each entry of the n x n matrices is one [8,
128] register. An iteration is elementwise arithmetic on registers, and nothing
but the logits and the result passes through HBM: 2 n^2 numbers a token forward,
3 n^2 backward. The arithmetic is that of `mhc.kernels.xla.sinkhorn`. The
backward kernel runs the iteration again and keeps its divisors on chip, 2 n
numbers an iteration.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc import axes
from mhc.kernels.xla import sinkhorn as xla

TILE = (8, 128)  # tokens of a block, as a float32 register holds them
TOKENS = TILE[0] * TILE[1]
LARGEST = 8  # n; every entry is a register, and lines of the program


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def sinkhorn(
  logits: Float[Array, 'n n t'],
  num_iters: int,
  eps: float,
  interpret: bool = False,
) -> Float[Array, 'n n t']:
  """`manifold.sinkhorn_project` of [n, n, t], float32, tokens minor.

  Args:
    logits: any number of tokens; blocks are filled up inside.
    num_iters, eps: as there.
    interpret: run the kernel's program without a TPU.
  """
  kernel = functools.partial(_forward, num_iters=num_iters, eps=eps)
  work = num_iters * (4 * len(logits) ** 2 + 2 * len(logits))
  return _call(kernel, 'sinkhorn_forward', (logits,), (), work, interpret)


def _vjp_forward(logits, num_iters, eps, interpret):
  return sinkhorn(logits, num_iters, eps, interpret), logits


def _vjp_backward(num_iters, eps, interpret, logits, cotangent):
  kernel = functools.partial(_backward, num_iters=num_iters, eps=eps)
  divisors = pltpu.VMEM(
    (max(1, num_iters - 1), len(logits), *TILE), jnp.float32
  )
  return (
    _call(
      kernel,
      'sinkhorn_backward',
      (logits, cotangent),
      (divisors, divisors),
      num_iters * (16 * len(logits) ** 2 + 8 * len(logits)),
      interpret,
    ),
  )


sinkhorn.defvjp(_vjp_forward, _vjp_backward)


def _forward(logits, out, *, num_iters, eps):
  kernel, rows, columns = xla.start(eps, logits[...])
  rows, columns = jax.lax.fori_loop(
    0,
    num_iters - 1,
    lambda _, carry: xla.iteration(eps, kernel, *carry),
    (xla.row_step(eps, kernel, rows, columns), columns),
  )
  out[...] = xla.scale(kernel, rows, columns)


def _backward(logits, cotangent, out, row_log, column_log, *, num_iters, eps):
  kernel, rows0, columns = xla.start(eps, logits[...])

  def forward(number, carry):
    row_log[number], column_log[number] = carry
    return xla.iteration(eps, kernel, *carry)

  def back(number, carry):
    grad, rows, columns = carry
    before = row_log[num_iters - 2 - number], column_log[num_iters - 2 - number]
    grad = xla.row_adjoint(kernel, grad, rows, columns)
    grad = xla.column_adjoint(kernel, grad, before[0], columns)
    return grad, *before

  first = (xla.row_step(eps, kernel, rows0, columns), columns)
  last = jax.lax.fori_loop(0, num_iters - 1, forward, first)
  grad = cotangent[...] * xla.scale(kernel, *last)
  carry = jax.lax.fori_loop(0, num_iters - 1, back, (grad, *last))
  grad = xla.row_adjoint(kernel, *carry)
  out[...] = xla.start_adjoint(eps, kernel, grad, rows0, carry[2])


def _call(kernel, name, arrays, scratch, work, interpret):
  """Runs a kernel over blocks of tokens of [n, n, t] arrays.

  `work` is its operations a token, for the compiler's schedule.
  """
  n, _, num_tokens = arrays[0].shape
  blocks = pl.cdiv(num_tokens, TOKENS)
  missing = blocks * TOKENS - num_tokens

  def tiled(x):
    x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)))
    return x.reshape(n, n, blocks * TILE[0], TILE[1])

  spec = pl.BlockSpec((n, n, *TILE), lambda block: (0, 0, block, 0))
  out = pl.pallas_call(
    kernel,
    grid=(blocks,),
    in_specs=[spec] * len(arrays),
    out_specs=spec,
    # Inside a shard_map the result differs between devices as the logits do.
    out_shape=axes.struct_varying_as(
      arrays[0], (n, n, blocks * TILE[0], TILE[1]), jnp.float32
    ),
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    name=name,
    cost_estimate=pl.CostEstimate(
      flops=work * blocks * TOKENS,
      transcendentals=n * n * blocks * TOKENS,
      bytes_accessed=4 * (len(arrays) + 1) * n * n * blocks * TOKENS,
    ),
    interpret=interpret,
  )(*map(tiled, arrays))
  return out.reshape(n, n, -1)[..., :num_tokens]
