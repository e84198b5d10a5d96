"""One description of a launch: for jax_triton, the interpreter, the compiler.

A kernel's parameters are its inputs, its outputs, and by name the number of
tokens and the constants, in this order.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import triton


@dataclasses.dataclass(frozen=True)
class Launch:
  """A kernel, its grid, the shapes of its outputs, what it is compiled for."""

  kernel: Callable
  grid: tuple[int, ...]
  outputs: tuple[jax.ShapeDtypeStruct, ...]
  constants: Mapping[str, Any]
  num_warps: int
  num_stages: int = 1


def interpreted() -> bool:
  """Returns whether Triton was imported with TRITON_INTERPRET=1."""
  return triton.knobs.runtime.interpret


def run(launch: Launch, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The outputs, from a GPU or, under TRITON_INTERPRET=1, from the CPU."""
  if interpreted():
    from mhc.kernels.triton import interpret

    return jax.pure_callback(
      lambda *values: interpret.run(launch, *values), launch.outputs, *arrays
    )
  import jax_triton

  return jax_triton.triton_call(
    *arrays,
    kernel=launch.kernel,
    out_type=launch.outputs,
    grid=launch.grid,
    name=launch.kernel.__name__,
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    **launch.constants,
  )
