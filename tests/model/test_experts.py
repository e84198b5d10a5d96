"""Every way to run the experts against a loop over them in float64."""

import functools

import jax
import jax.numpy as jnp
from jaxprs import equations
import numpy as np
import pytest

from mhc.model import experts
from mhc.model import rows

TOKENS, DIM, HIDDEN, NUM = 40, 6, 10, 8


def inputs(seed=0):
  keys = jax.random.split(jax.random.key(seed), 5)
  weights = experts.Weights(
    jax.random.normal(keys[0], (NUM, DIM, HIDDEN)),
    jax.random.normal(keys[1], (NUM, DIM, HIDDEN)),
    jax.random.normal(keys[2], (NUM, HIDDEN, DIM)),
  )
  return jax.random.normal(keys[3], (TOKENS, DIM)), weights


def assignments(load, k):
  """[tokens, k] distinct experts a token, of a given skew."""
  rng = np.random.default_rng(k)
  order = np.stack([rng.permutation(NUM) for _ in range(TOKENS)])
  if load == 'skewed':
    order = np.argsort(rng.random((TOKENS, NUM)) * np.arange(1, NUM + 1) ** 3)
  elif load == 'one has all':
    rest = np.stack([1 + rng.permutation(NUM - 1) for _ in range(TOKENS)])
    order = np.concatenate([np.zeros((TOKENS, 1), int), rest], axis=1)
  elif load == 'one has none':
    order = np.stack([rng.permutation(NUM - 1) for _ in range(TOKENS)])
  return jnp.asarray(order[:, :k], jnp.int32)


def reference(x, gates, weights, chosen):
  """A dense loop: every expert on every token, then the chosen ones, gated."""
  every = []
  for e in range(NUM):
    gate = x @ weights.gate[e]
    hidden = gate / (1 + jnp.exp(-gate)) * (x @ weights.up[e])
    every.append(hidden @ weights.down[e])
  out = jnp.take_along_axis(jnp.stack(every, 1), chosen[..., None], axis=1)
  return jnp.sum(out * gates[..., None], axis=1)


def ragged(x, gates, weights, chosen):
  queue = rows.make_queue(chosen, NUM)
  route, sizes = rows.window(queue, 0, chosen.size)
  out = experts.ragged(rows.spread(x, route), sizes, weights)
  return rows.collect(out, gates, route)


def roomy(x, gates, weights, chosen):
  out, dropped = experts.capacity(
    x, chosen, gates, weights, rows_per_expert=chosen.size
  )
  assert dropped.shape == ()
  return out


def dropless(x, gates, weights, chosen):
  return experts.dropless(x, chosen, gates, weights)


PATHS = {'dropless': dropless, 'ragged': ragged, 'capacity': roomy}


def gates_of(chosen):
  return jax.random.uniform(jax.random.key(7), chosen.shape)


@functools.partial(jax.jit, static_argnames='path')
def pulled(*floats, chosen, cotangent, path):
  out, pull_back = jax.vjp(lambda *f: path(*f, chosen), *floats)
  return out, pull_back(cotangent)


@pytest.mark.parametrize(
  'load', ['even', 'skewed', 'one has all', 'one has none']
)
@pytest.mark.parametrize(
  'k', [1, 3, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 4, 5, 6))]
)
def test_outputs_and_all_gradients_match_a_dense_loop(load, k):
  x, weights = inputs()
  chosen = assignments(load, k)
  gates = gates_of(chosen)
  cotangent = jax.random.normal(jax.random.key(9), (TOKENS, DIM))
  with jax.enable_x64():
    *floats, wide = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, jnp.float64),
      (x, gates, weights, cotangent),
    )
    want = pulled(*floats, chosen=chosen, cotangent=wide, path=reference)
    want = jax.tree.map(np.asarray, want)
  for name, path in PATHS.items():
    got = pulled(
      x, gates, weights, chosen=chosen, cotangent=cotangent, path=path
    )
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      scale = np.abs(b).max()
      np.testing.assert_allclose(
        np.asarray(a) / scale, b / scale, rtol=0, atol=1e-5, err_msg=name
      )


def test_capacity_drops_the_later_tokens_and_says_so():
  x, weights = inputs()
  chosen = assignments('one has all', 1)
  slots = TOKENS // NUM
  out, dropped = jax.jit(experts.capacity, static_argnums=4)(
    x, chosen, None, weights, slots
  )
  np.testing.assert_allclose(dropped, 1 - slots / TOKENS, rtol=1e-6)
  kept = np.abs(out).max(axis=1) > 0
  assert kept[:slots].all()
  assert not kept[slots:].any()


def test_fewer_rows_than_experts():
  x, weights = inputs()
  chosen = jnp.array([[3], [1]], jnp.int32)
  gates = gates_of(chosen)
  out = jax.jit(dropless)(x[:2], gates, weights, chosen)
  want = jax.jit(reference)(x[:2], gates, weights, chosen)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_large_blocks():
  """In blocks of 128 rows: an expert without any, and a half-filled block."""
  sizes = (0, 1600, 130)
  assert experts.rows_of_block(sum(sizes), len(sizes)) == 128
  keys = jax.random.split(jax.random.key(0), 5)
  weights = experts.Weights(
    *(jax.random.normal(key, (3, 4, 4)) for key in keys[:3])
  )
  x = jax.random.normal(keys[3], (sum(sizes), 4))
  cotangent = jax.random.normal(keys[4], x.shape)
  counts = jnp.array(sizes, jnp.int32)

  @functools.partial(jax.jit, static_argnums=0)
  def both_ways(multiply, *operands):
    out, pull_back = jax.vjp(lambda x, w: multiply(x, counts, w), *operands)
    return out, pull_back(cotangent)

  got, want = (
    both_ways(multiply, x, weights)
    for multiply in (experts.blocked, experts.ragged)
  )
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ('num_rows', 'num_experts', 'block'),
  [(0, 8, 1), (5, 8, 1), (64, 8, 8), (2048, 8, 64), (36_864, 18, 512)],
)
def test_blocks_grow_with_the_rows(num_rows, num_experts, block):
  assert experts.rows_of_block(num_rows, num_experts) == block


@pytest.mark.parametrize('dispatch', ['dropless', 'ragged', 'capacity'])
def test_experts_elsewhere_add_nothing(dispatch, monkeypatch):
  """Half of the experts are here; the others' rows and gradients are 0."""
  x, weights = inputs()
  chosen = assignments('even', 3)
  half = experts.Weights(*(w[: NUM // 2] for w in weights))
  here, gates = chosen < NUM // 2, gates_of(chosen)
  local = jnp.where(here, chosen, NUM // 2)
  if dispatch == 'ragged':
    monkeypatch.setattr(experts, 'blocked', experts.ragged)

  def some(x, gates, half):
    if dispatch == 'capacity':
      return experts.capacity(x, local, gates, half, chosen.size)[0]
    return experts.dropless(x, local, gates, half)

  def masked(x, gates, half):
    whole = experts.Weights(
      *(
        jnp.concatenate([part, w[NUM // 2 :]])
        for part, w in zip(half, weights, strict=True)
      )
    )
    return reference(x, jnp.where(here, gates, 0), whole, chosen)

  cotangent = jax.random.normal(jax.random.key(3), (TOKENS, DIM))

  @functools.partial(jax.jit, static_argnums=0)
  def both_ways(function, *floats):
    out, pull_back = jax.vjp(function, *floats)
    return out, pull_back(cotangent)

  results = [both_ways(one, x, gates, half) for one in (some, masked)]
  for got, want in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
def test_rows_are_sorted_once_and_never_scattered(path):
  """Neither forward nor backward; but their numbers and, of CPUs, weights."""
  x, weights = inputs()
  chosen = assignments('even', 3)

  def loss(*floats):
    return jnp.sum(path(*floats, chosen))

  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(
    x, gates_of(chosen), weights
  )
  found = [*equations(jaxpr.jaxpr)]
  assert sum(one.primitive.name == 'sort' for one in found) == 1
  scattered = [
    one.outvars[0].aval
    for one in found
    if one.primitive.name.startswith('scatter')
  ]
  assert all(one.ndim != 2 for one in scattered), scattered
