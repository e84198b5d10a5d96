"""Devices of machines that are absent, to compile for."""

import os

import jax
from jax.experimental import topologies

from mhc.kernels import chips
from mhc.planner import gpu_targets


def devices(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ValueError: its compiler is not installed or does not know the topology.
  """
  if topology == 'cpu':
    return jax.devices('cpu')
  name, _, size = topology.partition(':')
  if name in gpu_targets.GPUS or (size.isdigit() and name not in chips.CHIPS):
    return gpu_targets.devices(topology)
  # libtpu reads these from a TPU host at start; the last lifts its lock.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  try:
    return topologies.get_topology_desc(topology, 'tpu').devices
  except Exception as error:  # of several types, jaxlib's own among them
    raise ValueError(
      f'topology={topology!r} cannot be compiled for '
      f"({str(error).splitlines()[0]}): give 'cpu', GPUs such as 'h100:8', or "
      "a TPU slice such as 'v5p:2x2x1' or 'v6e:4x4', which requires pip "
      "install 'jax[tpu]'"
    ) from None
