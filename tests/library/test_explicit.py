"""Meshes with Explicit axes: the values and gradients of one device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import mhc
from mhc import connections
from mhc import explicit
from mhc import gains

N, DIM = 4, 8
ITERS = 3  # of Sinkhorn: few, for the sake of the compiler
SPLIT = {
  'batch': P('data'),
  'time': P(None, 'data'),
  'features': P(None, None, None, 'data'),
  'batch and features': P('data', None, None, 'model'),
  'batch and time': P('data', 'model'),
}
KINDS = {
  'residual': lambda: mhc.Residual(),
  'hc': lambda: mhc.HC(DIM, N, 1),
  'hc off': lambda: mhc.HC(DIM, N, 1, res='off'),
  'mhc': lambda: mhc.MHC(DIM, N, 1, sinkhorn_iters=ITERS),
  'identity': lambda: mhc.MHC(DIM, N, 1, mixing='identity'),
  'kronecker': lambda: mhc.MHC(DIM, N, 1, mixing='kronecker'),
  'static': lambda: mhc.MHC(
    DIM, N, 1, pre='static', post='off', sinkhorn_iters=ITERS
  ),
}


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def perturbed(module, seed):
  """Away from the initial values, where many gradients vanish.

  Not far: HC's streams grow with it, and their rounding from site to site.
  """
  leaves, tree = jax.tree.flatten(module)
  moved = [
    np.asarray(leaf) + 0.3 * normal(100 * seed + i, leaf.shape)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(tree, moved)


def mesh(kind):
  """As `jax.make_mesh` makes it unless asked otherwise: Explicit."""
  return jax.make_mesh((4, 2), ('data', 'model'), (kind, kind))


def two_sublayers(parameters, x):
  """Both ways from one sub-layer to the next, and the end of the streams."""
  first, second, collapse = parameters
  h, context = first.pre(x)
  x = first.post(jnp.sin(h), context)
  h, context = second.pre(x)
  h, context = second.advance(jnp.sin(h), context)
  return collapse(second.post(jnp.cos(h), context))


def loss(function, parameters, x, weights):
  return jnp.sum(function(parameters, x) * weights)


@functools.cache
def on_one_device(kind):
  """The gradient of two sub-layers, its arguments and what it is there."""
  n = 1 if kind == 'residual' else N
  parts = KINDS[kind](), KINDS[kind](), mhc.Collapse('learned', DIM, n)
  parameters = tuple(perturbed(part, i) for i, part in enumerate(parts))
  given = parameters, normal(10, (4, 4, n, DIM)), normal(11, (4, 4, DIM))
  both = gradient(two_sublayers)
  return both, given, both(*given)


def gradient(function):
  return jax.jit(
    jax.value_and_grad(functools.partial(loss, function), argnums=(0, 1))
  )


def compare(both, given, want, spec, kind):
  """Value and gradients on a kind of mesh against one device."""
  parameters, x, weights = given
  here = mesh(kind)
  with jax.set_mesh(here):
    split = jax.device_put(x, NamedSharding(here, spec))
    got = both(parameters, split, jax.device_put(weights, P()))
    if kind == AxisType.Explicit:
      assert (
        jax.typeof(split).sharding.spec == jax.typeof(got[1][1]).sharding.spec
      )
  # Sums over tokens cancel: of the largest gradient, not of each.
  scale = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(want))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=1e-6)


OFTEN = [
  ('mhc', 'batch and time'),
  *((kind, 'batch and features') for kind in ('residual', 'hc', 'static')),
]
SELDOM = [
  *(
    ('mhc', split)
    for split in ('batch', 'time', 'features', 'batch and features')
  ),
  *((kind, 'batch') for kind in ('residual', 'hc', 'identity')),
  *(
    (kind, 'batch and features') for kind in ('hc off', 'identity', 'kronecker')
  ),
]


@pytest.mark.parametrize(
  ('kind', 'split'),
  [*OFTEN, *(pytest.param(*each, marks=pytest.mark.slow) for each in SELDOM)],
)
def test_connections_have_the_gradients_of_one_device(kind, split):
  # With Auto axes every kind is called as on one device.
  auto = [AxisType.Auto] if kind == 'mhc' else []
  for axes in (AxisType.Explicit, *auto):
    compare(*on_one_device(kind), SPLIT[split], axes)


def test_the_projection_has_the_gradients_of_one_device():
  both = gradient(lambda _, x: mhc.sinkhorn_project(x))
  given = (), *(normal(seed, (4, 8, N, N)) for seed in range(2))
  want = both(*given)
  for split in ('batch', 'batch and time'):
    for axes in (AxisType.Explicit, AxisType.Auto):
      compare(both, given, want, SPLIT[split], axes)


def test_single_pass_expansion_and_gains():
  x = normal(10, (4, 8, DIM))
  connection = perturbed(mhc.SinglePass(DIM, N, 0), 0)

  def run(x):
    wide = mhc.expand(x, N, scale='random')
    weights = jnp.ones((N, 4 * 8))
    h, context = connection.pre(connections.StreamsWithPre(wide, weights))
    state = connection.post(jnp.sin(h), context)
    res = jnp.moveaxis(context.mappings.res, -1, 0)
    return state.x, gains.profile(res[None])['composite_fwd']

  want = jax.jit(run)(x)
  with jax.set_mesh(mesh(AxisType.Explicit)):
    got = jax.jit(run)(jax.device_put(x, P('data')))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_dimensions_that_are_merged_are_split_by_all_their_axes():
  assert explicit.merged(None, None) is None
  assert explicit.merged('data', None) == ('data',)
  assert explicit.merged(('data', 'pipe'), 'model') == ('data', 'pipe', 'model')
