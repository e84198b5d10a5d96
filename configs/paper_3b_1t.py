"""The paper's 3b_1t model and run (arXiv 2512.24880, Table 5).

    python launch/aot.py --config=configs/paper_3b_1t.py --count
    python launch/aot.py --config=configs/paper_3b_1t.py:residual --count

The argument is the connection, mhc unless said. For a pod: the paper does not
print losses.
"""

import ml_collections

from mhc import plain
from mhc import sizes


def get_config(kind: str = 'mhc') -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(plain.to_dict(sizes.paper('3b_1t', kind)))
