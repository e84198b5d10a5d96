"""Times of the operations on the device at hand, next to those of a copy.

Machines are shared: the operation and a copy of the streams are timed in turn,
and their ratio is what can be relied on.
"""

from collections.abc import Callable, Iterator
import itertools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from mhc.kernels import api
from mhc.planner import kernel_cost

WARM_UP = 2  # rounds that compile and fill caches
TOGETHER = 2e-3  # seconds of calls that are waited for together


def rows(
  operations,
  widths,
  num_tokens: int,
  n: int,
  implementation: api.Implementation | None = None,
  rounds: int = 15,
) -> Iterator[dict[str, Any]]:
  """Yields one row per operation, width and direction, which is measured.

  `ns_per_token` includes the start of a program, some 0.1 ms where calls do not
  overlap: take enough tokens for several of them. `ideal_bytes` are the least
  that the operation can move, per token, and rates are those of moving them.
  """
  on_tpu = jax.default_backend() == 'tpu'
  for operation, width in itertools.product(operations, widths):
    operands = [
      0.1 * jax.random.normal(jax.random.key(number), shape.shape, shape.dtype)
      for number, shape in enumerate(
        kernel_cost.case(operation, width, num_tokens, n)
      )
    ]
    tensor = operands[0]
    if on_tpu and operation != 'sinkhorn':
      operands[0] = jnp.moveaxis(tensor, 0, 1)
    forward, both = kernel_cost.functions(
      operation, implementation, streams_first=on_tpu
    )
    cotangent = jax.tree.map(
      lambda o: jnp.ones(o.shape, o.dtype), jax.eval_shape(forward, *operands)
    )
    alone, back = (
      kernel_cost.lower_bound(operation, direction, n, width)
      for direction in ('forward', 'backward')
    )
    for direction, elements, function, arguments in (
      ('forward', alone, forward, tuple(operands)),
      ('forward+backward', alone + back, both, (cotangent, *operands)),
    ):
      ideal = elements * tensor.dtype.itemsize
      spent, copy = seconds(function, arguments, tensor, rounds)
      rate = ideal * num_tokens / spent
      yield {
        'op': operation,
        'direction': direction,
        'C': width,
        'n': n,
        'tokens': num_tokens,
        'dtype': str(tensor.dtype),
        'ms': 1e3 * spent,
        'ns_per_token': 1e9 * spent / num_tokens,
        'ideal_bytes': ideal,
        'gigabytes_per_second': 1e-9 * rate,
        'share_of_copy': rate * copy / (2 * tensor.nbytes),
      }


def seconds(
  function: Callable, arguments: tuple, tensor: jax.Array, rounds: int
) -> tuple[float, float]:
  """Median seconds of the function and of a copy of `tensor`."""
  programs = (
    (jax.jit(function), arguments),
    (jax.jit(jnp.copy), (tensor,)),
  )
  samples = [], []
  # Short programs are called several times before one waits for them, so that
  # the device does not wait for Python.
  together = [1, 1]
  for number in range(rounds + WARM_UP):
    for which, (call, inputs) in enumerate(programs):
      start = time.perf_counter()
      for _ in range(together[which]):
        out = call(*inputs)
      jax.block_until_ready(out)
      spent = (time.perf_counter() - start) / together[which]
      del out
      if number >= WARM_UP:
        samples[which].append(spent)
      else:
        together[which] = min(20, math.ceil(TOGETHER / spent))
  return statistics.median(samples[0]), statistics.median(samples[1])
