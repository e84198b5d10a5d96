"""What a user calls reaches the kernels: lowered for TPUs that are not here."""

import collections
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import mhc
from mhc import functional
from mhc import kernels
from mhc.kernels import reference
from mhc.planner import targets

T, N, DIM = 64, 4, 128


@pytest.fixture(scope='module')
def mesh():
  devices = np.array(targets.devices('v5e:2x2')[:1])
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def kernel_calls(mesh, function, *shapes):
  """Pallas calls, by name, of a function lowered for the mesh's TPU."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
    for shape in shapes
  ]
  with jax.set_mesh(mesh):
    text = jax.jit(function).lower(*arguments).as_text()
  return collections.Counter(re.findall(r'kernel_name = "(\w+)"', text))


def test_the_projection_is_one_kernel(mesh):
  calls = kernel_calls(mesh, mhc.sinkhorn_project, (2, T, N, N))
  assert calls == {'sinkhorn_forward': 1}


def test_a_connection_is_one_kernel_each_for_reading_and_projecting(mesh):
  one = kernel_calls(mesh, lambda x: mhc.MHC(DIM, N, 0).pre(x), (2, T, N, DIM))
  assert one == {'pre_forward': 1, 'sinkhorn_forward': 1}


def test_what_no_kernel_serves_is_plain_jax(mesh):
  """Widths that are no multiple of 128, large matrices, no matrices."""
  narrow = kernel_calls(mesh, lambda x: mhc.MHC(64, N, 0).pre(x), (2, T, N, 64))
  assert narrow == {'sinkhorn_forward': 1}
  assert not kernel_calls(mesh, mhc.sinkhorn_project, (T, 12, 12))
  assert not kernel_calls(mesh, mhc.sinkhorn_project, (0, N, N))


def test_implementations_are_chosen_by_name():
  logits = jax.random.normal(jax.random.key(0), (T, N, N))
  want = mhc.sinkhorn_project(logits, implementation='xla')
  got = mhc.sinkhorn_project(logits, implementation='pallas')  # interpreted
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
  # A TypeError of the shape checker's, where that is on.
  with pytest.raises((ValueError, TypeError), match='cuda'):
    mhc.sinkhorn_project(logits, implementation='cuda')
  with pytest.raises(NotImplementedError, match=r"'pallas'.*'implicit'"):
    mhc.sinkhorn_project(logits, backward='implicit', implementation='pallas')


def test_batches_of_the_kernel_by_vmap():
  logits = jax.random.normal(jax.random.key(0), (3, T, N, N))

  def project(x):
    return mhc.sinkhorn_project(x, implementation='pallas')

  np.testing.assert_array_equal(jax.vmap(project)(logits), project(logits))


def test_the_default_is_the_papers_everywhere():
  """20 iterations and eps = 0: Eq. 9."""
  from mhc import config

  settings = config.ConnectionConfig()
  assert settings.sinkhorn_eps == kernels.SINKHORN_EPS == 0
  assert settings.sinkhorn_iters == kernels.SINKHORN_ITERS == 20
  options = mhc.MHC(DIM, N, 0).options
  assert (options.sinkhorn_iters, options.sinkhorn_eps) == (20, 0.0)
  logits = jax.random.normal(jax.random.key(0), (N, N, T))
  want = reference.sinkhorn(logits, 20, 0.0)
  for got in (
    kernels.sinkhorn(logits),
    mhc.sinkhorn_project(logits, axes=(0, 1)),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_functions_of_plain_arrays_are_the_module():
  """`functional` on a dict of arrays, and `MHC`, are one definition."""
  keys = jax.random.split(jax.random.key(0), 4)
  connection = mhc.MHC(DIM, N, 1)
  params = {
    name: leaf + 0.1 * jax.random.normal(key, leaf.shape)
    for key, (name, leaf) in zip(
      keys, functional.init(DIM, N, 1).items(), strict=False
    )
  }
  for name, value in params.items():
    getattr(connection, name)[...] = value
  x = jax.random.normal(keys[3], (2, 3, N, DIM))
  h, context = functional.pre(params, x)
  want, other = connection.pre(x)
  np.testing.assert_array_equal(h, want)
  following, further = functional.advance(params, jnp.sin(h), context)
  want, other = connection.advance(jnp.sin(h), other)
  np.testing.assert_array_equal(following, want)
  np.testing.assert_array_equal(
    functional.post(following, further), connection.post(want, other)
  )
