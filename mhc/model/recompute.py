r"""Which activations are kept for the backward pass (Sec. 4.3.2 of the paper).

Connections and norms are cheap to compute and large to keep: n streams of d
numbers around every sub-layer. The paper keeps the streams once every L_r
sub-layers and the output of every heavy sub-layer, and computes the rest of the
L_r sub-layers again when their gradient is due. With L sub-layers that is, in
units of d numbers a token,

    n ceil(L / L_r)       streams at the start of each recompute block
    (n + 2) L_r           x, H_pre x and its norm, inside the block at hand
    L                     sub-layer outputs, whatever L_r is

so that L_r* = argmin n ceil(L / L_r) + (n + 2) L_r, about sqrt(n L / (n + 2))
(Eq. 20). Policies, by what they compute again inside a recompute block:

    none         nothing; no recompute blocks
    mhc          connections and norms (the paper's plan)
    mhc+experts  and the hidden rows of routed experts, which are the most of
                 what is left: k rows a token, and room for more
    mhc+block    everything but the output of each sub-layer
    full         everything

The tensors that a policy may keep are marked where they arise, with
`name_output`, `name_inner` and `name_routed`; see `precision.mark`.
"""

from collections.abc import Callable
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from mhc import config as config_lib
from mhc import precision
from mhc.model import parts

Policy = Literal['none', 'mhc', 'mhc+experts', 'mhc+block', 'full']

OUTPUT = 'sublayer_output'
INNER = 'sublayer_inner'
ROUTED = 'routed_inner'

# Marks what a sub-layer returns, and what it would keep for its own gradient;
# of that the rows of routed experts.
name_output = functools.partial(precision.mark, OUTPUT)
name_inner = functools.partial(precision.mark, INNER)
name_routed = functools.partial(precision.mark, ROUTED)

KEPT = {
  'mhc': (OUTPUT, INNER, ROUTED),
  'mhc+experts': (OUTPUT, INNER),
  'mhc+block': (OUTPUT,),
  'full': (),
}

# For parts of a layer that are cheaper to compute again than to keep, whatever
# the policy: only what goes in is kept. In a loop's body, as all of ours are,
# there is nothing that common-subexpression elimination could undo.
checkpoint_cheap = functools.partial(jax.checkpoint, prevent_cse=False)


@parts.part(parts.BUFFERS)
def scan(body: Callable, carry, xs, *, policy: Policy, blocks: int) -> tuple:
  """`jax.lax.scan` of a block's function, in recompute blocks.

  Args:
    body: as for `jax.lax.scan`; one step is one transformer block.
    carry: initial carry, the streams.
    xs: trees with a leading dimension of transformer blocks.
    policy: see above.
    blocks: transformer blocks in a recompute block (L_r / 2); a last, shorter
      one takes the remainder.
  """
  if policy == 'none':
    return jax.lax.scan(body, carry, xs)
  keep = jax.checkpoint_policies.save_only_these_names(*KEPT[policy])
  # prevent_cse is for code outside of a loop.
  checkpoint = functools.partial(jax.checkpoint, prevent_cse=False, policy=keep)
  length = len(jax.tree.leaves(xs)[0])
  blocks = min(blocks, length)
  if blocks == 1:
    return jax.lax.scan(checkpoint(body), carry, xs)

  @checkpoint
  def group(carry, xs):
    return jax.lax.scan(body, carry, xs)

  whole = length // blocks * blocks
  grouped = jax.tree.map(
    lambda leaf: leaf[:whole].reshape(-1, blocks, *leaf.shape[1:]), xs
  )
  carry, ys = jax.lax.scan(group, carry, grouped)
  ys = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), ys)
  if whole < length:
    carry, rest = group(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))
    ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, rest)
  return carry, ys


def peak_stream_units(num_sublayers: int, num_streams: int, every: int) -> int:
  """Eq. 20's peak: stream tensors of d numbers a token, for L_r = `every`."""
  starts = math.ceil(num_sublayers / every)
  return num_streams * starts + (num_streams + 2) * every


def optimal_interval(num_sublayers: int, num_streams: int) -> int:
  """L_r*: the number of sub-layers, whole blocks of two, that minimises it."""
  return min(
    range(2, num_sublayers + 1, 2),
    key=lambda every: peak_stream_units(num_sublayers, num_streams, every),
  )


def recompute_interval(
  config: config_lib.ModelConfig, num_blocks: int | None = None
) -> int:
  """L_r of a model, or of a stage of `num_blocks`: as set, or the optimum."""
  return config.recompute_every or optimal_interval(
    2 * (num_blocks or config.num_blocks), config.connection.streams
  )
