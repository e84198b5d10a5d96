"""Operations with several implementations each, imported as `mhc.kernels`.

    sinkhorn    logits to doubly stochastic matrices
    pre         streams to what a sub-layer reads, and the projection z
    post        a sub-layer's output back to the streams, which it mixes
    advance     `post` of one sub-layer and `pre` of the next in one pass
    collapse    `post` of the last sub-layer and the sum of the streams

`reference` defines them on one page, `api` says which implementation runs.
"""

if __name__ != 'mhc.kernels':
  raise ImportError(
    f'this is mhc.kernels, not {__name__}: install the project '
    '(pip install -e .) and import mhc.kernels'
  )

from mhc.kernels.api import (
  SINKHORN_EPS,
  SINKHORN_ITERS,
  Implementation,
  advance,
  collapse,
  post,
  pre,
  sinkhorn,
)

__all__ = [
  'SINKHORN_EPS',
  'SINKHORN_ITERS',
  'Implementation',
  'advance',
  'collapse',
  'post',
  'pre',
  'sinkhorn',
]
