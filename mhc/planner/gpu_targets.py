"""GPUs that programs can be compiled for without having one.

XLA's compiler takes a description of its target, a `GpuTargetConfigProto` as
text. The figures are those of XLA's own h100_sxm, h200 and b200, in
https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs
without the rates of single units, which XLA then derives from cores and clock.
"""

import functools
import importlib.util
import os
import pathlib
from typing import NamedTuple

import jax
from jax.experimental import topologies

HOST = 8  # most GPUs of one machine


class Gpu(NamedTuple):
  """One device.

  Attributes:
    kind: JAX's name for it.
    capability: CUDA compute capability, major number.
    cores: streaming multiprocessors.
    clock: GHz.
    bandwidth: bytes a second, HBM.
    hbm: bytes; JAX allocates three quarters of them for programs, unless
      XLA_PYTHON_CLIENT_MEM_FRACTION sets another fraction.
    cache: bytes, L2.
  """

  kind: str
  capability: int
  cores: int
  clock: float
  bandwidth: int
  hbm: int
  cache: int


GPUS = {
  'h100': Gpu(
    kind='NVIDIA H100 80GB HBM3',
    capability=9,
    cores=132,
    clock=1.98,
    bandwidth=3_352_320_000_000,
    hbm=84_942_979_072,
    cache=50 << 20,
  ),
  'h200': Gpu(
    kind='NVIDIA H200 141GB HBM3e',
    capability=9,
    cores=132,
    clock=1.98,
    bandwidth=4_800_000_000_000,
    hbm=151_397_597_184,
    cache=50 << 20,
  ),
  'b200': Gpu(
    kind='NVIDIA B200',
    capability=10,
    cores=148,
    clock=1.965,
    bandwidth=7_672_320_000_000,
    hbm=191_514_411_008,
    cache=132_644_864,
  ),
}


def textproto(gpu: Gpu) -> str:
  """The GpuTargetConfigProto; its literals are common to these GPUs."""
  return f"""
gpu_device_info {{
  name: "{gpu.kind}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{
    major: {gpu.capability}
    feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {gpu.cores}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth}
  device_memory_size: {gpu.hbm}
  l2_cache_size: {gpu.cache}
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"
"""


def devices(topology: str) -> list[jax.Device]:
  """The GPUs of one machine, such as 'h100:8', to compile for.

  Raises:
    ValueError: an unknown GPU, more than a machine has, or JAX's CUDA plugin,
      which holds the compiler, is not installed.
  """
  name, _, number = topology.partition(':')
  if name not in GPUS:
    raise ValueError(
      f'topology={topology!r} names an unknown GPU: choose from '
      f'{", ".join(GPUS)}'
    )
  if number not in {str(i) for i in range(1, HOST + 1)}:
    raise ValueError(
      f'topology={topology!r} must name 1 to {HOST} GPUs of one machine, such '
      f"as '{name}:{HOST}'"
    )
  _own_assembler_first()
  try:
    return topologies.get_topology_desc(
      name,
      'cuda',
      target_config=textproto(GPUS[name]),
      topology=f'1x1x{number}',  # slices, machines, GPUs
    ).devices
  except NotImplementedError:  # raised by JAX for a missing plugin
    raise ValueError(
      f"topology={topology!r} requires JAX's CUDA compiler (but no GPU): "
      "pip install 'jax[cuda13]'"
    ) from None


@functools.cache
def _own_assembler_first():
  """Puts the plugin's ptxas first on PATH: an old one rejects the kernels."""
  packages = importlib.util.find_spec('nvidia')
  for root in packages.submodule_search_locations if packages else ():
    for found in pathlib.Path(root).glob('*/bin/ptxas'):
      others = os.environ.get('PATH', os.defpath)
      os.environ['PATH'] = f'{found.parent}{os.pathsep}{others}'
