"""The machine at hand: its devices, JAX's versions, and whether they fit."""

import importlib.metadata
import os
import platform

import jax

from mhc.runtime import accelerators
from mhc.runtime import processes

LIBRARIES = ('jax', 'jaxlib')
PLUGINS = ('libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin')
OTHERS = ('flax', 'numpy', 'mhc-jax')


def skip_search():
  """Keeps JAX on the CPU of a machine without accelerators.

  libtpu, installed to compile for TPUs, would search for one at length.
  """
  if 'JAX_PLATFORMS' not in os.environ and not accelerators.found():
    jax.config.update('jax_platforms', 'cpu')


def describe() -> str:
  """Returns lines for people: devices, versions, what is wrong with them."""
  devices = jax.devices()
  first = devices[0]
  lines = [
    f'JAX runs on {len(devices)} x {first.device_kind} ({first.platform})',
    ', '.join(_versions((*LIBRARIES, *PLUGINS))),
    ', '.join([*_versions(OTHERS), f'Python {platform.python_version()}']),
  ]
  problem = accelerators.unused(first.platform)
  return '\n'.join([*lines, f'WARNING: {problem}'] if problem else lines)


def identity() -> dict[str, str | int]:
  """What the last bits of a computation depend on, beside its mesh."""
  first = jax.devices()[0]
  found = {'device': first.device_kind, 'jax': jax.__version__}
  if first.platform == 'cpu':
    found['CPU cores'] = processes.num_cores()
  return found


def _versions(names):
  for name in names:
    try:
      yield f'{name} {importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError:
      continue
