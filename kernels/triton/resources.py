"""Compiles every kernel for GPUs without one: what does each need?

Registers and bytes of stack, where registers spill to, come from cuobjdump,
bytes of shared memory from the compiler.
"""

import re
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc.kernels.triton import sinkhorn
from mhc.kernels.triton import streams

TYPES = {'bfloat16': '*bf16', 'float32': '*fp32'}


def launches(n, d, num_tokens, dtype):
  """Every launch, with the types of its inputs."""
  x = jax.ShapeDtypeStruct((num_tokens, n, d), dtype)
  y = jax.ShapeDtypeStruct((num_tokens, d), dtype)
  wide = jax.ShapeDtypeStruct((), jnp.float32)
  phi = jax.ShapeDtypeStruct((n * d, 2 * n + n * n), jnp.float32)
  part = x if dtype == jnp.bfloat16 else phi
  logits = jax.ShapeDtypeStruct((n, n, num_tokens), jnp.float32)
  yield sinkhorn.forward(logits, 20, 0.0), [wide]
  yield sinkhorn.backward(logits, 20, 0.0), [wide] * 2
  yield streams.pre_forward(x, phi, 1e-6), [x, part, wide, wide]
  yield (
    streams.advance_forward(x, phi, 1e-6),
    [x, y, wide, wide, part, wide, wide],
  )
  yield streams.post_forward(x), [x, y, wide, wide]
  yield streams.collapse_forward(x), [x, y, wide]
  yield streams.pre_dots(x), [x, y]
  yield streams.advance_dots(x), [x, y, wide, wide, y]
  yield streams.collapse_backward(x), [x, y, y, wide]
  yield streams.post_backward(x), [x, y, wide, wide, x]
  yield streams.pre_backward(x, phi), [x, y, wide, wide, wide, part]
  yield (
    streams.advance_backward(x, phi),
    [x, y, wide, wide, x, y, wide, wide, wide, part],
  )


def compile_for(launch, inputs, capability):
  """Compiles a launch, all pointers aligned to 16 bytes."""
  names = launch.kernel.arg_names
  arrays = [TYPES[a.dtype.name] for a in (*inputs, *launch.outputs)]
  signature = dict(zip(names, arrays, strict=False))
  for name in names[len(arrays) :]:
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature[name] = 'constexpr' if name in constexprs else 'i32'
  constants = {
    name: launch.constants[name]
    for name in names
    if signature[name] == 'constexpr'
  }
  aligned = {
    (number,): [['tt.divisibility', 16]]
    for number, name in enumerate(names)
    if signature[name] != 'constexpr'
  }
  return triton.compile(
    ASTSource(launch.kernel, signature, constants, aligned),
    target=GPUTarget('cuda', capability, 32),
    options={'num_warps': launch.num_warps, 'num_stages': launch.num_stages},
  )


def usage(compiled):
  """(registers, bytes of stack, bytes of shared memory)."""
  with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
    file.write(compiled.asm['cubin'])
    file.flush()
    text = subprocess.run(
      [triton.knobs.nvidia.cuobjdump.path, '-res-usage', file.name],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', text).groups()
  return int(registers), int(stack), compiled.metadata.shared


def rows(dims):
  """Yields the resources of each kernel, n = 4, bfloat16, sm_80 and sm_90."""
  for d in dims:
    for launch, inputs in launches(4, d, 16384, jnp.bfloat16):
      for capability in (80, 90):
        registers, stack, shared = usage(
          compile_for(launch, inputs, capability)
        )
        yield {
          'kernel': launch.kernel.__name__,
          'C': d,
          'sm': capability,
          'warps': launch.num_warps,
          'registers': registers,
          'spilled_bytes': stack,
          'shared_bytes': shared,
        }
