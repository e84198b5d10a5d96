"""The specification: every operation that has a kernel, in plain jax.numpy.

In the dtype of its arguments, so that tests can evaluate it in float64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinkhorn(
  logits: Float[Array, 'n n t'], num_iters: int, eps: float
) -> Float[Array, 'n n t']:
  """Columns, then rows, divided by their sums, `num_iters` times (Eq. 9).

  With eps > 0 as DeepSeek's kernels do it, see `manifold.sinkhorn_project`.
  """
  matrix = jax.nn.softmax(logits, axis=0) + eps
  for number in range(num_iters):
    if number:
      matrix = matrix / (jnp.sum(matrix, axis=0, keepdims=True) + eps)
    matrix = matrix / (jnp.sum(matrix, axis=1, keepdims=True) + eps)
  return matrix
