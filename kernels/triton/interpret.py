"""Launches on the CPU: Triton's interpreter over numpy, without torch.

Set TRITON_INTERPRET=1 before anything imports triton.
"""

import threading
import types

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# The interpreter exchanges functions of triton.language while a kernel runs,
# and XLA may run several callbacks at once.
_LOCK = threading.Lock()

TYPES = {'bfloat16': 'bf16', 'float32': 'fp32', 'int32': 'i32'}


class Buffer:
  """An ndarray with the methods of torch tensors that the interpreter calls."""

  def __init__(self, array):
    self.array = array
    self.dtype = TYPES[array.dtype.name]
    self.shape = array.shape
    self.data_ptr = lambda: array.ctypes.data
    self.size = lambda: array.shape
    self.stride = lambda: [s // array.itemsize for s in array.strides]
    self.storage_offset = lambda: 0
    self.untyped_storage = self.cpu = lambda: self
    self.new_empty = lambda *_, **__: self
    self.set_ = self.copy_ = lambda *_: None


def run(launch, *arrays):
  """The outputs of a `launch.Launch`; what it leaves unwritten is NaN."""
  arguments = [np.ascontiguousarray(np.asarray(x)) for x in arrays]
  outputs = [np.full(out.shape, np.nan, out.dtype) for out in launch.outputs]
  buffers = map(Buffer, (*arguments, *outputs))
  # Masked lanes may overflow, as they may on a GPU.
  with np.errstate(all='ignore'), _LOCK:
    launch.kernel[launch.grid](*buffers, **launch.constants)
  return tuple(outputs)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
  """The interpreter's product reads bfloat16 as integers: widen it first."""
  del input_precision, max_num_imprecise_acc
  wide = [
    x.data.view(ml_dtypes.bfloat16).astype(np.float32)
    if x.dtype.scalar == tl.bfloat16
    else x.data
    for x in (a, b)
  ]
  product = np.matmul(*wide, dtype=d.data.dtype)
  return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _create_dot


def _create_inline_asm(self, asm, constraints, values, kinds, is_pure, pack):
  """The only assembly of these kernels moves a register: `tiles.pinned`."""
  del self, constraints, kinds, is_pure, pack
  if asm != 'mov.b32 $0, $1;':
    raise NotImplementedError(asm)
  return types.SimpleNamespace(get_result=lambda number: values[number])


interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm


def _cast(self, source, kind):
  """Rounds to the nearest bfloat16, as GPUs do; the interpreter truncates."""
  if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
    data = source.data.astype(ml_dtypes.bfloat16).view(np.uint16)
    return interpreter.TensorHandle(data, kind.scalar)
  return _plain_cast(self, source, kind)


_plain_cast = interpreter.InterpreterBuilder.cast_impl
interpreter.InterpreterBuilder.cast_impl = _cast
