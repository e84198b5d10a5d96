"""Manifold-constrained hyper-connections for JAX and Flax."""

from mhc.connections import HC, MHC, Residual
from mhc.manifold import sinkhorn_project
from mhc.streams import Collapse, expand

__all__ = ['HC', 'MHC', 'Collapse', 'Residual', 'expand', 'sinkhorn_project']
