"""What connections refuse, and what they take in spite of its looks."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mhc
from mhc import arguments as checks
from mhc import context as context_lib

N, DIM = 4, 8
MADE = (
  lambda n: mhc.MHC(DIM, n, 0),
  lambda n: mhc.HC(DIM, n, 0),
  lambda n: mhc.MHC(DIM, n, 0, mixing='cayley'),
)


def streams(*batch, n=N, dtype=jnp.float32):
  return jnp.ones((*batch, n, DIM), dtype)


@pytest.mark.parametrize('kind', [mhc.MHC, mhc.HC, mhc.SinglePass])
def test_a_place_is_three_whole_numbers(kind):
  for arguments, word in (
    ((DIM, 0, 4), 'num_streams=0'),
    ((0, N, 0), 'dim=0'),
    ((DIM, N, -5), 'index=-'),
    ((DIM, N, 0.5), r'index=[01]\.5'),
    ((DIM, N, '1'), 'index='),
  ):
    with pytest.raises(ValueError, match=word):
      kind(*arguments)
  # What the tests' type checker refuses first.
  for arguments, word in (((DIM, 4.0, 0), '=4.0'), ((True, N, 0), 'dim=True')):
    with pytest.raises(ValueError, match=word):
      checks.check_place(*arguments)


def test_whole_numbers_of_numpy_and_jax_are_taken():
  kinds = (np.int64(1), jnp.int32(1), np.uint8(1))
  for index in kinds:
    assert mhc.MHC(DIM, N, index).bias[...][1] == 3
  biases = jax.vmap(lambda i: mhc.MHC(DIM, N, i).bias[...])(jnp.arange(3))
  assert biases.shape[0] == 3
  with pytest.raises(ValueError, match='whole'):
    jax.vmap(lambda i: mhc.MHC(DIM, N, i).bias[...])(jnp.arange(3.0))


def test_other_streams_are_refused_with_their_shape():
  for module, x, word in (
    (mhc.Residual(), streams(3), '1 streams'),
    (mhc.MHC(DIM, N, 0), streams(3, n=3), r'\(3, 3, 8\)'),
    (mhc.HC(DIM, N, 0), streams(3, n=1), r'\(3, 1, 8\)'),
    (mhc.MHC(DIM, N, 0), streams(3, dtype=jnp.int32), 'i(nt)?32'),
    (mhc.HC(DIM, N, 0), streams(3, dtype=jnp.complex64), 'c(omplex)?64'),
  ):
    with pytest.raises((ValueError, TypeError), match=word):
      module.pre(x)
  for kind in ('learned', 'sum', 'mean'):
    with pytest.raises(ValueError, match=r'2 streams.*\(3, 4, 8\)'):
      mhc.Collapse(kind, DIM, 2)(streams(3))


def traced(function):
  """Calls a function whose arrays need no values."""
  jax.eval_shape(lambda: function() or ())


@pytest.mark.parametrize('make', [*MADE, lambda n: mhc.Residual()])
def test_outputs_of_other_tokens_are_refused_with_their_shape(make):
  connection = make(N)

  @traced
  def leave_with_them():
    n = 1 if isinstance(connection, mhc.Residual) else N
    h, context = connection.pre(streams(3, 5, n=n))
    for shape in ((4, 5, DIM), (3, 1, DIM), (15, DIM)):
      for leave in (connection.post, connection.advance):
        with pytest.raises((ValueError, TypeError), match=r'\(3, 5, 8\)'):
          leave(jnp.ones(shape), context)
    with pytest.raises(ValueError, match='bfloat16'):
      connection.post(h.astype(jnp.bfloat16), context)


def test_a_context_of_two_batches_is_refused():
  connection = mhc.MHC(DIM, N, 0)

  @traced
  def leave_with_it():
    _, context = connection.pre(streams(3))
    _, other = connection.pre(streams(5))
    mixed = context_lib.Context(context.x, other.mappings)
    with pytest.raises(ValueError, match=r'\(4, 5\), not \(4, 3\)'):
      connection.post(jnp.ones((3, DIM)), mixed)


@pytest.mark.parametrize('make', MADE)
@pytest.mark.parametrize(
  'batch',
  [
    (2, 0),
    *(pytest.param(batch, marks=pytest.mark.slow) for batch in ((0,), (0, 3))),
  ],
)
def test_empty_batches_stay_empty(make, batch):
  def run(connection, x):
    h, context = connection.pre(x)
    h, context = connection.advance(h, context)
    return connection.post(h, context)

  @jax.jit
  def everything(connection, x):
    return (
      run(connection, x),
      jax.grad(lambda c: jnp.sum(run(c, x)))(connection),
      mhc.sinkhorn_project(jnp.ones((*batch, N, N))),
      mhc.Collapse('learned', DIM, N)(x),
    )

  x = streams(*batch)
  out, grads, projected, collapsed = everything(make(N), x)
  assert out.shape == x.shape
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
  assert projected.shape == (*batch, N, N)
  assert collapsed.shape == (*batch, DIM)


def test_only_real_logits_are_projected():
  for dtype in (jnp.complex64, np.complex128):
    with pytest.raises(TypeError, match=r'real|c64|c128'):
      mhc.sinkhorn_project(np.ones((N, N), dtype))


def test_parameters_of_other_dtypes_make_float32_mappings():
  """A model that was cast as a whole."""

  @jax.jit
  def pre(connection, x):
    h, context = connection.pre(x)
    return h, context.mappings

  x = jax.random.normal(jax.random.key(0), (3, N, DIM))
  for make in MADE:
    connection = make(N)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), connection)
    want, _ = pre(connection, x)
    got, mappings = pre(cast, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(mappings)} == {
      jnp.dtype(jnp.float32)
    }
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-3)


def test_modules_take_rngs_and_can_be_static_and_tabulated():
  rngs = nnx.Rngs(0)
  assert mhc.Residual(rngs=rngs)
  for connection in (
    mhc.MHC(DIM, N, 0, rngs=rngs),
    mhc.HC(DIM, N, 0, rngs=rngs),
    mhc.SinglePass(DIM, N, 0, rngs=rngs),
    mhc.Collapse('learned', DIM, N, rngs=rngs),
  ):
    graphdef, params = nnx.split(connection)
    hash(graphdef)

    @functools.partial(jax.jit, static_argnums=0)
    def count(graphdef, params):
      return sum(
        leaf.size for leaf in jax.tree.leaves(nnx.merge(graphdef, params))
      )

    assert count(graphdef, params) > 0


@pytest.mark.parametrize(
  'kind', [mhc.MHC, pytest.param(mhc.HC, marks=pytest.mark.slow)]
)
def test_forward_mode_by_autodiff(kind):
  """Hessian-vector products, forward over reverse, against twice reverse."""
  x = jax.random.normal(jax.random.key(0), (3, N, DIM))
  direction = jax.random.normal(jax.random.key(1), x.shape)

  def loss(connection, x):
    h, context = connection.pre(x)
    h, context = connection.advance(jnp.sin(h), context)
    return jnp.sum(jnp.cos(connection.post(jnp.sin(h), context)))

  few = {'sinkhorn_iters': 2} if kind is mhc.MHC else {}
  plain, free = (
    kind(DIM, N, 0, implementation=i, **few) for i in (None, 'autodiff')
  )
  slope, free_slope = (
    functools.partial(jax.grad(loss, 1), each) for each in (plain, free)
  )

  @jax.jit
  def both(x):
    twice = jax.grad(lambda x: jnp.sum(slope(x) * direction))(x)
    return slope(x), twice

  got = jax.jit(lambda x: jax.jvp(free_slope, (x,), (direction,)))(x)
  want = both(x)
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  np.testing.assert_allclose(got[1], want[1], atol=1e-4)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jit(lambda x: jax.jvp(slope, (x,), (direction,))).lower(x)
