"""Cross entropy by chunks against all logits at once."""

from unittest import mock

import jax
import jax.numpy as jnp
from jaxprs import equations
import numpy as np
import pytest
from slow import pipeline_grid as grid

from mhc.parallel import chunked_loss
from mhc.parallel import loss

pytestmark = pytest.mark.usefixtures('optax_promotion')

VOCAB, DIM = 37, 8


def operands(dtype='float32', shape=(4, 6)):
  """Hidden states, a matrix of logits around 1, targets of which some are not.

  The last column's logits are large enough to overflow exp.
  """
  rng = np.random.default_rng(0)
  h = rng.normal(size=(shape[0] * shape[1], DIM))
  weight = rng.normal(size=(DIM, VOCAB))
  weight[:, -1] *= 100
  targets = jnp.asarray(rng.integers(-3, VOCAB, shape, np.int32))
  return jnp.asarray(h, dtype), jnp.asarray(weight, dtype), targets


def at_once(h, weight, targets):
  logits = jnp.matmul(h, weight, preferred_element_type='float32')
  return loss.nats_of_rows(logits.reshape(*targets.shape, -1), targets)


@pytest.mark.parametrize('chunks', [6, 5])  # of 24 tokens
def test_nats_and_gradients_are_those_of_all_logits_at_once(chunks):
  h, weight, targets = operands()
  assert (targets < 0).any()
  np.testing.assert_allclose(
    chunked_loss.nats_of_rows(h, weight, targets, chunks),
    at_once(h, weight, targets),
    rtol=1e-6,
  )
  got, want = (
    jax.value_and_grad(lambda h, w, f=f: 3 * f(h, w), (0, 1))(h, weight)
    for f in (
      lambda h, w: chunked_loss.total_nats(h, w, targets, chunks),
      lambda h, w: jnp.sum(at_once(h, w, targets)),
    )
  )
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_matrix_gradient_is_summed_in_float32():
  """In bfloat16 256 + 1 is 256: a sum over 512 chunks would stop there."""
  h = jnp.ones((512, 1), 'bfloat16')
  weight = jnp.zeros((1, 2), 'bfloat16')
  targets = jnp.zeros((1, 512), jnp.int32)
  gradient = jax.grad(
    lambda w: 2 * chunked_loss.total_nats(h, w, targets, 512)
  )(weight)
  assert gradient.dtype == jnp.bfloat16
  np.testing.assert_array_equal(gradient, [[-512, 512]])


@pytest.mark.parametrize(
  ('tokens', 'vocab', 'chunks'),
  [
    (4096, 129_280, 4),
    (5 * 4096, 129_280, 20),
    (4099, 129_280, 4),  # a prime number
    (4096, 258, 1),
    (7, 1 << 40, 7),  # one token is the least
  ],
)
def test_as_few_chunks_as_hold_half_a_gibibyte(tokens, vocab, chunks):
  assert chunked_loss.num_chunks(tokens, vocab) == chunks


def test_no_array_has_the_logits_of_all_tokens():
  h, weight, targets = operands()
  traced = jax.make_jaxpr(
    jax.grad(lambda h, w: chunked_loss.total_nats(h, w, targets, 6), (0, 1))
  )(h, weight)
  sizes = {v.aval.size for eqn in equations(traced.jaxpr) for v in eqn.outvars}
  assert len(h) // 6 * VOCAB in sizes
  assert len(h) * VOCAB not in sizes


@pytest.mark.long
def test_a_step_by_chunks_has_the_gradients_of_one_device():
  case = grid.Case('residual', True, (2, 1, 2), transport='all_gather')
  settings = grid.config(case)
  bound = 4 * settings.model.vocab_size * grid.TIME // 2  # half a row's logits
  want = grid.reference(case)
  with (
    mock.patch.object(chunked_loss, 'AT_A_TIME', bound),
    mock.patch.object(
      chunked_loss, 'total_nats', wraps=chunked_loss.total_nats
    ) as taken,
  ):
    error, where = grid.worst(grid.gradient(settings), want)
  assert taken.call_args.args[-1] == 2
  assert error < 3e-5, where
