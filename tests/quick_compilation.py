"""How programs that run once are compiled: most of the time is the compiler's.

A CPU's fusions are by default each lowered by MLIR, in a context of its own,
which is more than half of a compilation. The slow proofs that set flags of
their own, like the users of a CPU, have it so; here the older emitters write
LLVM's instructions at once, and LLVM does not optimise them. Nor are the lines
of the source that each instruction comes from taken along, which the compiler
copies many times.
"""

import pathlib

FLAGS = (
  '--xla_backend_optimization_level=0 '
  '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters'
)
LOCATIONS = {'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0'}


def environment(compiled: pathlib.Path) -> dict[str, str]:
  """Variables of a process that compiles so, and keeps what it compiled."""
  return LOCATIONS | {
    'XLA_FLAGS': FLAGS,
    'JAX_COMPILATION_CACHE_DIR': str(compiled),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
