"""How far an implementation is from the reference in float64.

For an operation's outputs and every gradient, from cotangents drawn at random:
the largest error, and what rounding explains. The reference runs on the CPU, so
that an accelerator without float64 can be held against it.
"""

from collections.abc import Callable, Sequence
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhc.kernels import api
from mhc.kernels import reference

# By size: (n, C, tokens, dtype). Token counts that fill no tile, and one that
# fills many.
CASES = (
  (2, 128, 17, jnp.float32),
  (3, 128, 5, jnp.bfloat16),
  (4, 128, 37, jnp.bfloat16),
  (4, 256, 5, jnp.float32),
  (8, 128, 5, jnp.bfloat16),
  (4, 1280, 4096, jnp.bfloat16),
)
OUTPUTS = {
  'sinkhorn': ('res',),
  'pre': ('h', 'z'),
  'post': ('x',),
  'advance': ('x', 'h', 'z'),
  'collapse': ('h',),
}


class Error(NamedTuple):
  """The error of one tensor: 'h' is an output, 'd x' the gradient of x.

  Attributes:
    largest: of |got - want|.
    bound: two steps of bfloat16 at the largest number of a bfloat16 tensor,
      2e-5 times the largest number of a float32 tensor.
  """

  tensor: str
  largest: float
  bound: float


def operands(
  operation: str,
  n: int,
  d: int,
  num_tokens: int,
  dtype: Any,
  num: int | None = None,
  seed: int = 0,
) -> tuple[jax.Array, ...]:
  """Random operands; phi has `num` columns, n^2 + 2 n if not given."""
  draw = np.random.default_rng(seed)
  num = num or 2 * n + n * n
  shapes = {
    'x': (num_tokens, n, d),
    'y': (num_tokens, d),
    'post': (n, num_tokens),
    'res': (n, n, num_tokens),
    'logits': (n, n, num_tokens),
    'phi': (n * d, num),
    'alpha': (),
    'bias': (n,),
  }
  scales = {'phi': (n * d) ** -0.5, 'logits': 3.0}
  return tuple(
    jnp.asarray(
      draw.normal(size=shapes[name]) * scales.get(name, 1.0),
      dtype if name in ('x', 'y') else jnp.float32,
    )
    for name in _names(operation)
    if name in shapes
  )


def errors(
  operation: str,
  arguments: Sequence[jax.Array],
  static: Sequence[int | float],
  implementation: api.Implementation | None,
  seed: int = 0,
) -> list[Error]:
  """Errors of the outputs and of the gradients of all operands.

  Args:
    operation: of `api`.
    arguments: its arrays, from `operands` or of your own.
    static: its other arguments: norm_eps, or num_iters and eps.
    implementation: as `api` takes it.
    seed: of the cotangents.

  Returns:
    One a tensor, in the order of `OUTPUTS` and of the operands.
  """
  plain = lambda *inputs: getattr(reference, operation)(*inputs, *static)
  kernel = lambda *inputs: getattr(api, operation)(
    *inputs, *static, implementation
  )
  draw = np.random.default_rng(seed)
  cotangents = jax.tree.map(
    lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype),
    jax.eval_shape(plain, *arguments),
  )
  run = jax.jit(functools.partial(_both_ways, kernel))
  results = run(tuple(arguments), cotangents)

  def advance(*inputs):
    """The reference, with x' as the kernel rounded it."""
    out = reference.post(*inputs[:4])
    rounding = np.asarray(results[0], np.float64) - out
    out = out + jax.lax.stop_gradient(rounding)
    return out, *reference.pre(out, *inputs[4:], *static)

  oracle = advance if operation == 'advance' else plain
  both_ways = functools.partial(_both_ways, oracle)
  wants = _exact(both_ways, tuple(arguments), cotangents)
  if operation == 'advance':
    wants[0] = _exact(reference.post, *arguments[:4])
  names = (
    *OUTPUTS[operation],
    *(f'd {name}' for name in _names(operation)[: len(arguments)]),
  )
  return [
    Error(name, *_error(got, want))
    for name, got, want in zip(names, results, wants, strict=True)
  ]


def _names(operation) -> tuple[str, ...]:
  return tuple(inspect.signature(getattr(api, operation)).parameters)


def _both_ways(function: Callable, arguments, cotangents) -> list[jax.Array]:
  """The outputs and every gradient."""
  outputs, pull_back = jax.vjp(function, *arguments)
  return [*jax.tree.leaves(outputs), *pull_back(cotangents)]


def _exact(function: Callable, *arguments):
  """function(*arguments) in float64, on the CPU."""
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    wide = jax.tree.map(
      lambda x: jnp.asarray(np.asarray(x), jnp.float64), arguments
    )
    return jax.tree.map(np.asarray, jax.jit(function)(*wide))


def _error(got, want) -> tuple[float, float]:
  if got.shape != want.shape:
    raise AssertionError(f'a result of shape {got.shape}, not {want.shape}')
  error = np.max(np.abs(np.asarray(got, np.float64) - want))
  largest = np.max(np.abs(want))
  if got.dtype == jnp.bfloat16:
    step = np.spacing(largest.astype(got.dtype)).astype(np.float64)
    return float(error), float(2 * step)
  return float(error), float(2e-5 * largest)
