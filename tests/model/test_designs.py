"""What any design owes the transformer: recomputation, decoding, a step."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc import config as config_lib
from mhc.config import dicts
from mhc.model import transformer

DESIGNS = {
  kind: dict(kind=kind)
  for kind in config_lib.KINDS
  if kind not in ('residual', 'hc', 'mhc', 'mhc_single_pass')
} | {
  'learned scale': dict(expand_scale='learned', sinkhorn_iters=3),
  'newton': dict(sinkhorn_method='newton', sinkhorn_iters=8),
}
# Each kind of state that travels; -m 'slow or not slow' runs all.
SOME = 'frac', 'mhar'
EVERY = [
  name if name in SOME else pytest.param(name, marks=pytest.mark.slow)
  for name in DESIGNS
]


def settings(name, recompute='none', every=2):
  return dicts.replace(
    config_lib.ModelConfig(num_blocks=3, dim=16, ffn_dim=16),
    connection=DESIGNS[name],
    recompute=recompute,
    recompute_every=every,
    attention=dict(num_heads=1, head_dim=8, rope_dim=4, kv_rank=8),
  )


@functools.cache
def parameters(name):
  """Far from the start, but for places, which are no parameters."""
  model = transformer.Transformer(settings(name), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)

  def moved(path, leaf):
    if 'place' in jax.tree_util.keystr(path):
      return leaf
    return leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)

  params = nnx.to_pure_dict(nnx.state(model))
  return jax.tree_util.tree_map_with_path(moved, params)


def gradient(name, **options):
  graph, _ = transformer.abstract(settings(name, **options))
  rows = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)

  @jax.jit
  @jax.grad
  def run(params):
    logits = nnx.merge(graph, nnx.State(params))(rows[:, :-1])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    )

  return run(parameters(name))


@pytest.mark.parametrize('name', EVERY)
def test_recompute_changes_no_gradient(name):
  want = gradient(name)
  for policy, every in (('full', 2), ('mhc+block', 4), ('mhc', 0)):
    if name not in SOME or policy == 'full':
      found = gradient(name, recompute=policy, every=every)
      # Rotations keep what rounding does to differences; in float64, see
      # `float64`, they agree as the others do.
      atol = 1e-5 if name == 'orthogonal' else 1e-6
      for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
  for path, leaf in jax.tree_util.tree_leaves_with_path(want):
    place = 'place' in jax.tree_util.keystr(path)
    assert bool(jnp.any(leaf)) != place, path


@pytest.mark.parametrize('name', EVERY)
def test_decoding_agrees_with_the_whole_row(name):
  graph, _ = transformer.abstract(settings(name))
  rows = jax.random.randint(jax.random.key(2), (2, 6), 0, 256)
  model = nnx.merge(graph, nnx.State(parameters(name)))
  whole, cache = jax.jit(lambda model: model(rows))(model), None

  @jax.jit
  def decode(model, token, cache, start):
    return model.decode(token, cache, start)

  cache = model.empty_cache(2, 6)
  for at in range(6):
    token = rows[:, at : at + 1]
    logits, cache = decode(model, token, cache, jnp.int32(at))
    np.testing.assert_allclose(logits[:, 0], whole[:, at], atol=1e-4)
  assert jnp.std(whole) > 0.1


def test_a_learned_scale_starts_as_copies_and_parts_the_streams():
  rows = jax.random.randint(jax.random.key(1), (2, 8), 0, 256)

  @jax.jit
  def logits():
    of_both = settings('learned scale'), settings('learned scale').plain
    return [transformer.Transformer(s, rngs=nnx.Rngs(0))(rows) for s in of_both]

  np.testing.assert_allclose(*logits(), atol=1e-5)
  scale = gradient('learned scale')['expand']['scale']
  assert scale.shape == (4, 16)
  assert float(jnp.std(scale, axis=0).max()) > 1e-6
  with pytest.raises(ValueError, match="scale='random', which makes"):
    config_lib.ConnectionConfig(pre='off', expand_scale='learned')
