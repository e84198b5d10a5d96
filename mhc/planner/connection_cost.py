"""What mHC adds to a step of the paper's models on TPUs, by its kernels.

A sub-layer calls `advance` three times a step: forward, once more for its
gradient (recompute='mhc'), and backward. A call takes its bundles or its bytes,
whichever is longer (`kernel_cost`). With s nanoseconds a sub-layer and token, L
sub-layers, and a residual model of f FLOPs a token on chips of peak F that
trains at the fraction m of it, the share is

    L s / (f / (m F))

of all else. What the projection's coefficients, the ends of the network and
transfers between stages take is not in it: a compiled plan has that.
"""

from collections.abc import Iterator, Sequence
import pathlib
from typing import Any

from mhc.config import presets
from mhc.kernels import chips
from mhc.parallel import counts
from mhc.planner import cost
from mhc.planner import kernel_cost

SIZES = ('3b', '9b', '27b')
CALLS = {'forward': 2, 'backward': 1}
# Of the peak: published for mixtures of experts, and more than that.
REACHED = (0.33, 0.5)


def rows(
  sizes: Sequence[str], generations: Sequence[str], folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Yields one row per size and generation.

  Args:
    sizes: of `presets.paper`.
    generations: some of `chips.CHIPS`.
    folder: from `bundles.folder`, called before this.
  """
  for size in sizes:
    residual = presets.paper(size, 'residual')
    flops = counts.count(residual.model, residual.data.seq_len)
    for generation in generations:
      spent = nanoseconds(residual.model.dim, generation, folder)
      own = 2 * residual.model.num_blocks * spent  # a token
      peak = chips.CHIPS[generation].flops
      yield {
        'size': size,
        'generation': generation,
        'ns_per_sublayer_and_token': spent,
        'us_per_token': own / 1e3,
        **{
          f'share_at_{reached:.0%}': own
          * 1e-9
          * reached
          * peak
          / flops['flops_per_token']
          for reached in REACHED
        },
      }


def nanoseconds(dim: int, generation: str, folder: pathlib.Path) -> float:
  """What the kernels of a sub-layer take for each token."""
  bundles = kernel_cost.scheduled('advance', dim, generation, folder)
  total = 0.0
  for direction, calls in CALLS.items():
    what = 'advance', direction, dim, generation
    moved = kernel_cost.hbm_ns_per_token(*what) / cost.STREAMED
    each = kernel_cost.schedule_ns_per_token(*what, bundles[direction])
    total += calls * max(moved, each)
  return total
