r"""Connections: the residual around a sub-layer, one stream or n of them.

    h, context = connection.pre(x)          # streams [..., n, d] -> [..., d]
    x = connection.post(F(h), context)      # streams [..., n, d]

From one sub-layer straight to the next, in one pass over the streams:

    h, context = following.advance(F(h), context)

`Residual` is the plain residual stream, `HC` mixes its streams freely
(arXiv 2409.19606), `MHC` by matrices of a constrained kind, doubly stochastic
ones by default (arXiv 2512.24880), and `SinglePass` is mHC with the read
weights one sub-layer early (DeepSeek-V4.1). `AttnRes`, `DenseFormer` and `X0`
choose among the outputs of earlier sub-layers, see `depth`. `Frac` mixes
fractions of one stream, and `WideResidual` is a control: a plain residual that
holds as much as n streams.

Around them, once per model, stand `expand` and `Collapse` (see `streams`), or
`open_slots` and `SlotCollapse`. They accept `rngs`, as modules do, and draw
nothing from them.
"""

from mhc.connections.depth import X0
from mhc.connections.depth import AttnRes
from mhc.connections.depth import DenseFormer
from mhc.connections.depth import SlotCollapse
from mhc.connections.depth import open_slots
from mhc.connections.frac import Frac
from mhc.connections.hc import HC
from mhc.connections.hc import HC_PARAMETERS
from mhc.connections.mhc import MHC
from mhc.connections.residual import Residual
from mhc.connections.single_pass import SinglePass
from mhc.connections.single_pass import StreamsWithPre
from mhc.connections.wide import WideResidual

__all__ = [
  'HC',
  'HC_PARAMETERS',
  'MHC',
  'X0',
  'AttnRes',
  'DenseFormer',
  'Frac',
  'Residual',
  'SinglePass',
  'SlotCollapse',
  'StreamsWithPre',
  'WideResidual',
  'open_slots',
]
