"""Which tensor has which dtype: the paper's Sec. 4.3.1 in one table.

`mark` names a tensor in the traced program. A name costs nothing when the
program runs; tests read the table off a traced training step by it, and
`recompute` chooses by it what is kept for the backward pass.
"""

from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Shaped

ACTIVATION = 'activation'  # model.dtype; bfloat16 in the paper's models
FLOAT32 = 'float32'

TENSORS = {
  # The streams, what a sub-layer reads of them and what it returns.
  'streams': ACTIVATION,
  'sublayer_input': ACTIVATION,
  'sublayer_output': ACTIVATION,
  # Inside a sub-layer: results of its matrix products and of what joins them.
  'sublayer_inner': ACTIVATION,
  'routed_inner': ACTIVATION,
  # x phi / r of Eq. 14-16, and H_pre, H_post, H_res.
  'mapping_logits': FLOAT32,
  'mappings': FLOAT32,
  'attention_logits': FLOAT32,
  'router_scores': FLOAT32,
  'logits': FLOAT32,
  'loss': FLOAT32,
}
# Not marked: parameters, their gradients and the optimiser's state are float32.
# A matrix is cast to the activations' dtype where it is used, but for phi and
# the router, whose products are float32 at the highest precision.


def mark(name: str, x: Shaped[Array, '...']) -> Shaped[Array, '...']:
  """x, under a name of `TENSORS`."""
  if TENSORS[name] == FLOAT32:
    assert jnp.promote_types(x.dtype, jnp.float32) == x.dtype, (name, x.dtype)
  return checkpoint_name(x, name)
