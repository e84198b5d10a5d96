"""Manifold-constrained hyper-connections for JAX and Flax."""

from mhc import functional
from mhc import gains
from mhc import kernels
from mhc.connections import HC, MHC, Residual, SinglePass
from mhc.manifold import sinkhorn_project
from mhc.streams import Collapse, expand

__all__ = [
  'HC',
  'MHC',
  'Collapse',
  'Residual',
  'SinglePass',
  'expand',
  'functional',
  'gains',
  'kernels',
  'sinkhorn_project',
]


def __getattr__(name: str):
  if name == '__version__':
    import importlib.metadata  # slow, and seldom asked for

    return importlib.metadata.version('mhc-jax')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
