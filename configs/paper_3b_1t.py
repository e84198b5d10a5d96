"""The paper's 3b_1t model and run (arXiv 2512.24880, Table 5).

    python launch/aot.py --config=configs/paper_3b_1t.py --count
    python launch/aot.py --config=configs/paper_3b_1t.py:residual --count

The argument is the connection, by default mhc. For a pod: the mesh is planned
for v5p:2x2x4 (docs/planner.md), and `launch/aot.py --suggest` finds others. The
paper does not print losses.
"""

import ml_collections

from mhc.config import dicts, presets


def get_config(kind: str = 'mhc') -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dicts.to_dict(presets.paper('3b_1t', kind)))
