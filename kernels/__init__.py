"""Operations with several implementations each, imported as `mhc.kernels`.

    sinkhorn    logits to doubly stochastic matrices
    pre         streams to what a sub-layer reads, and the projection z
    post        a sub-layer's output back to the streams, which it mixes
    advance     `post` of one sub-layer and `pre` of the next in one pass
    collapse    `post` of the last sub-layer and the sum of the streams

`reference` defines them on one page, `api` says which implementation runs.
"""

if __name__ != 'mhc.kernels':
  # A clone as the working directory hides the package `kernels` of others.
  import importlib.machinery
  import importlib.util
  import os
  import sys

  _here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
  _other = importlib.machinery.PathFinder.find_spec(
    __name__, [path for path in sys.path if os.path.realpath(path) != _here]
  )
  if _other is None or _other.loader is None:
    raise ImportError(
      f'{__file__} is mhc.kernels, not {__name__}: import mhc.kernels, after '
      'pip install -e . in the clone. No other package of this name is '
      'installed; if one is meant, install it'
    )
  sys.modules[__name__] = importlib.util.module_from_spec(_other)
  _other.loader.exec_module(sys.modules[__name__])
else:
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
