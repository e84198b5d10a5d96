"""Manifold-constrained hyper-connections for JAX and Flax."""

import pathlib

# Python that starts in a clone finds this folder before an installed package.
# There kernels/, configs/ and launch/ are not in it, but beside it.
_folder = pathlib.Path(__file__).parent
if not (_folder / 'kernels').is_dir():
  __path__.append(str(_folder.parent))

from mhc import functional
from mhc import gains
from mhc import kernels
from mhc import optimizer
from mhc.connections import HC, MHC, Residual, SinglePass
from mhc.manifold import sinkhorn_project
from mhc.observation import Observation, observe
from mhc.streams import Collapse, expand
from mhc.sublayer import Sublayer, wrap
from mhc.upcycling import upcycle

__all__ = [
  'HC',
  'MHC',
  'Collapse',
  'Observation',
  'Residual',
  'SinglePass',
  'Sublayer',
  'expand',
  'functional',
  'gains',
  'kernels',
  'observe',
  'optimizer',
  'sinkhorn_project',
  'upcycle',
  'wrap',
]


def __getattr__(name: str):
  import importlib

  if name == '__version__':
    import importlib.metadata  # slow, and seldom asked for

    return importlib.metadata.version('mhc-jax')
  if name == 'interop':  # needs safetensors
    return importlib.import_module('mhc.interop')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
