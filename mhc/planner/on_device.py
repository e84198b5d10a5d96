"""What the accelerator at hand does: right results, bandwidth, training steps.

Everything is measured in one run, and rates stand beside those of a copy and of
a matrix product of the same run, not of a data sheet.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import itertools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc import config as config_lib
from mhc.config import dicts, presets
from mhc.kernels import api
from mhc.kernels import parity
from mhc.model import attention
from mhc.parallel import counts
from mhc.planner import kernel_cost
from mhc.planner import search
from mhc.training import step

WARM_UP = 2  # rounds that do not count
PRODUCT = 8192  # of the square matrices whose product gives the rate


def implementations() -> tuple[str, ...]:
  """The operations' implementations on this platform, plain JAX first."""
  return api.preferred()[::-1]


def parity_rows(
  operations: Sequence[str] = kernel_cost.OPERATIONS, cases=parity.CASES
) -> Iterator[dict[str, Any]]:
  """Yields one row per operation and size: errors in units of rounding.

  For each implementation `worst` names the tensor whose error is the largest
  part of what rounding explains (`parity.Error.bound`), or why there is none.
  """
  for operation in operations:
    for n, d, num_tokens, dtype in cases:
      arguments = parity.operands(operation, n, d, num_tokens, dtype)
      row = {
        'op': operation,
        'n': n,
        'C': d,
        'tokens': num_tokens,
        'dtype': jnp.dtype(dtype).name,
      }
      for name in implementations():
        row[name], row[f'{name}_worst'] = _worst(operation, arguments, name)
      yield row


def _worst(operation, arguments, implementation):
  try:
    errors = parity.errors(
      operation,
      arguments,
      kernel_cost.static(operation),
      implementation,
    )
  except Exception as error:
    # A kernel that fails to compile or to run is a finding, not the end.
    line, *_ = str(error).partition('\n')
    return None, f'{type(error).__name__}: {line[:100]}'
  # A NaN is the worst there can be, and max() would pass it over.
  shares = [
    (np.nan_to_num(e.largest / e.bound, nan=np.inf), e.tensor) for e in errors
  ]
  share, tensor = max(shares)
  return float(share), tensor


def product_rate(rounds: int) -> float:
  """Measured FLOPs a second of a square bfloat16 product, the median."""
  size = PRODUCT if jax.default_backend() != 'cpu' else 512
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
  multiply = jax.jit(jnp.matmul)
  return 2 * size**3 / statistics.median(_times(lambda: multiply(a, b), rounds))


def attention_rows(rounds: int) -> Iterator[dict[str, Any]]:
  """Yields attention's time, forward and backward, in plain JAX and by kernel.

  Of one row of the paper's 3B. `of_product` is the rate of its causal FLOPs
  over that of a matrix product; `apart` the largest difference of any gradient
  from plain JAX, in units of the largest one.
  """
  time, heads = (4096, 16) if jax.default_backend() != 'cpu' else (256, 2)
  keys = jax.random.split(jax.random.key(0), 3)
  given = [
    jax.random.normal(key, (1, time, heads, width), jnp.bfloat16)
    for key, width in zip(keys, (192, 192, 128), strict=True)
  ]
  # Two products forward; backward twice those and the logits once more.
  flops = heads * time**2 * (3 * (192 + 128) + 192)
  rate, plain = product_rate(rounds), None
  for name in ('xla', 'auto'):

    def loss(query, key, value, name=name):
      out = attention.causal_attention(
        query, key, value, 192**-0.5, implementation=name
      )
      return jnp.sum(out.astype(jnp.float32))

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    got = [np.asarray(one, np.float32) for one in grad(*given)]
    plain = plain or got
    seconds = statistics.median(_times(lambda g=grad: g(*given), rounds))
    yield {
      'implementation': name,
      'ms': 1e3 * seconds,
      'of_product': flops / seconds / rate,
      'apart': max(
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(got, plain, strict=True)
      ),
    }


def base(num_blocks: int, num_rows: int) -> config_lib.Config:
  """The paper's 3B with fewer blocks; on a CPU a rung of the ladder."""
  if jax.default_backend() == 'cpu':
    config = presets.ladder('1m')
  else:
    flat = {'mesh.expert': 1, 'data.microbatch_size': 1}
    config = dicts.override(presets.paper('3b'), flat)
  changes = {
    'model.num_blocks': num_blocks,
    'data.batch_size': num_rows * jax.device_count(),
  }
  return dicts.override(config, changes)


def step_rows(
  base: config_lib.Config, kinds: Sequence[str], rounds: int
) -> Iterator[dict[str, Any]]:
  """Yields one row per kind of connection and implementation: a whole step.

  The programs are compiled at the same time, as one waits for minutes; they run
  one after the other, for the state of one may fill the device.
  `formula_ms` is what `search` expects of products at the rate measured here.
  """
  rate = product_rate(rounds)
  names = [
    (kind, name)
    for kind, name in itertools.product(kinds, implementations())
    # The residual has no streams and calls no kernel.
    if kind != 'residual' or name == 'xla'
  ]
  programs = [
    step.build(
      dicts.override(
        base,
        {
          'model.connection.kind': kind,
          'model.connection.implementation': name,
        },
      )
    )
    for kind, name in names
  ]
  lowered = [program.lower() for program in programs]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = [*pool.map(step.Step.compile, programs, lowered)]
  first = None
  for (kind, name), program, train in zip(
    names, programs, compiled, strict=True
  ):
    seconds = _step_seconds(program, train, rounds)
    first = first or seconds
    config = program.placement.config
    tokens = config.data.batch_size * config.data.seq_len
    count = counts.count(config.model, config.data.seq_len)
    flops = tokens * count['flops_per_token']
    yield {
      'kind': kind,
      'implementation': name,
      'ms': 1e3 * seconds,
      'formula_ms': 1e3 * flops / rate * search.PRODUCTS,
      'over_first': seconds / first,
      'tokens_per_second': tokens / seconds,
      'flops_per_second': flops / seconds,
      'share_of_product': flops / seconds / rate,
      'parameters': count['total_params'],
      'temporary_bytes': train.memory_analysis().temp_size_in_bytes,
    }


def _step_seconds(program, train, rounds):
  """Median seconds of an update, the state of which is freed after it."""
  tokens = program.random_tokens()
  state, inputs = program.init(0), program.inputs()

  def update():
    nonlocal state
    state, metrics = train(state, tokens, inputs)
    return metrics

  seconds = statistics.median(_times(update, rounds))
  jax.tree.map(lambda leaf: leaf.delete(), state)
  return seconds


def _times(call, rounds):
  samples = []
  for number in range(rounds + WARM_UP):
    start = time.perf_counter()
    jax.block_until_ready(call())
    if number >= WARM_UP:
      samples.append(time.perf_counter() - start)
  return samples
