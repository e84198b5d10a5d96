"""Invariants of each parameterisation, far from and near its initial value."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import axes
from mhc import mixing

TOKENS = 500


def random_matrices(kind, n, std=3.0):
  size = mixing.initial_logits(kind, n).size
  logits = std * jax.random.normal(jax.random.key(n), (size, TOKENS))
  out = mixing.matrices(kind, logits, n)
  assert out.shape == (n, n, TOKENS)
  return np.moveaxis(np.asarray(out), -1, 0)


@pytest.mark.parametrize('n', [1, 2, 4])
@pytest.mark.parametrize('kind', ['permutations', 'kronecker'])
def test_exactly_doubly_stochastic_without_iterating(kind, n):
  h = random_matrices(kind, n, std=20.0)
  assert (h >= 0).all()
  np.testing.assert_allclose(h.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(h.sum(2), 1, atol=1e-6)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 8])
def test_cayley_matrices_are_rotations(n):
  h = random_matrices('cayley', n)
  eye = np.broadcast_to(np.eye(n), h.shape)
  np.testing.assert_allclose(h @ h.swapaxes(1, 2), eye, atol=2e-5)
  np.testing.assert_allclose(np.linalg.det(h), 1, atol=1e-4)


@pytest.mark.parametrize('kind', ['permutations', 'kronecker', 'cayley'])
def test_the_matrix_of_one_stream_varies_over_devices_as_logits_do(kind):
  def matrix(logits):
    out = mixing.matrices(kind, logits, 1)
    assert axes.varying_axes(out) == {'data'}
    return out

  size = mixing.initial_logits(kind, 1).size
  over_devices = jax.shard_map(
    matrix,
    mesh=jax.make_mesh((2,), ('data',), (AxisType.Auto,)),
    in_specs=P(None, 'data'),
    out_specs=P(None, None, 'data'),
  )
  logits = jax.ShapeDtypeStruct((size, TOKENS), jnp.float32)
  assert jax.eval_shape(over_devices, logits).shape == (1, 1, TOKENS)


def test_permutations_reach_every_vertex_and_kronecker_does_not():
  vertices = 100.0 * jnp.eye(24)  # one logit dominates
  h = np.asarray(mixing.permutations(vertices, 4))
  found = {tuple(h[:, :, k].argmax(1)) for k in range(24)}
  assert len(found) == 24
  np.testing.assert_allclose(h.max(1), 1, atol=1e-6)
  corners = (
    100.0
    * jnp.array(
      [[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], jnp.float32
    ).T
  )
  h = np.asarray(mixing.kronecker(corners, 4))
  found = {tuple(h[:, :, k].argmax(1)) for k in range(4)}
  assert found == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}


@pytest.mark.parametrize('kind', ['sinkhorn', 'permutations', 'kronecker'])
def test_initial_matrices_are_doubly_stochastic_and_near_the_identity(kind):
  logits = mixing.initial_logits(kind, 4)[:, None]
  h = np.asarray(mixing.matrices(kind, logits, 4))[..., 0]
  np.testing.assert_allclose(h.sum(0), 1, atol=1e-6)
  np.testing.assert_allclose(h.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(np.diag(h), 0.994, atol=0.002)


def test_cayley_and_identity_start_at_the_identity():
  for kind in ('cayley', 'identity'):
    logits = mixing.initial_logits(kind, 4)[:, None]
    h = mixing.matrices(kind, logits, 4)
    np.testing.assert_array_equal(h[..., 0], jnp.eye(4))


def test_impossible_sizes_are_named():
  with pytest.raises(ValueError, match='6 streams'):
    mixing.initial_logits('permutations', 6)
  with pytest.raises(ValueError, match=r'power of two.*3'):
    mixing.initial_logits('kronecker', 3)
