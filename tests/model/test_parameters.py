"""The table of parameters: every leaf of every kind of model has one row."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

from mhc import config
from mhc.config import dicts
from mhc.model import parameters
from mhc.model import transformer

PARTS = (0, 0, 'mean'), (4, 0, 'mean'), (0, 8, 'learned')


def models():
  """Every kind with all parts, and one with fewer."""
  for kind in config.KINDS:
    own = kind in ('mhc_single_pass', 'frac', *config.DEPTH_KINDS)
    yield with_parts(kind, 4, 8, 'mean' if own else 'learned')
  for parts in PARTS:
    yield with_parts('mhc', *parts)
  yield dicts.replace(
    config.ModelConfig(num_blocks=2), connection=dict(expand_scale='learned')
  )
  yield dicts.replace(
    config.ModelConfig(num_blocks=2, tied_embeddings=True, adapter_rank=2),
    moe=dict(num_experts=4),
    attention=dict(
      kind='gqa', qkv_bias=True, qk_norm=True, value_residual=True
    ),
  )
  for kind in ('hc', 'mhc', 'mhc_single_pass'):
    parts = dict(pre='off', post='static', res='off', expand_scale='random')
    yield dicts.replace(
      config.ModelConfig(num_blocks=2), connection=dict(kind=kind, **parts)
    )


def with_parts(kind, experts, rank, collapse):
  """Two blocks; with experts, the first one is dense."""
  return dicts.replace(
    config.ModelConfig(num_blocks=2),
    connection=dict(kind=kind, collapse=collapse),
    attention=dict(query_rank=rank),
    moe=dict(num_experts=experts),
  )


def leaves(model):
  _, params = transformer.abstract(model)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    yield parameters.path_names(path), leaf


def test_each_leaf_matches_one_row_and_each_row_a_leaf():
  used = set()
  for model in models():
    for names, leaf in leaves(model):
      stack, row = parameters.locate(names)  # raises unless it is one
      used.add(row.path)
      dims = leaf.ndim - (stack is not None)
      assert len(row.split) <= dims, names
      assert (row.counted == 'lookup') == (names[0] == 'embed'), names
      assert (row.counted == 'routed') == (dims == 3), names
  assert used == {row.path for row in parameters.PARAMETERS}


def test_a_path_in_an_optimisers_state_is_the_parameters():
  _, params = transformer.abstract(next(models()))
  params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape), params)
  state = optax.adam(1e-3).init(params)
  found = {
    parameters.locate(parameters.path_names(path))
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  }
  assert found >= {
    parameters.locate(parameters.path_names(path))
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  }
  assert None in found  # the count of updates


def test_a_parameter_without_a_row_is_named():
  with pytest.raises(ValueError, match=r'ffn/gate/scale matches 0 rows'):
    parameters.locate(('dense_blocks', 'ffn', 'gate', 'scale'))
  path = (jax.tree_util.DictKey('other'), jax.tree_util.DictKey('weight'))
  with pytest.raises(ValueError, match=r'other.*is no parameter'):
    parameters.row(path)


@pytest.mark.parametrize('kind', config.KINDS)
def test_parameters_are_float32_under_x64(kind):
  settings = dicts.override(
    config.Config(), {'model.connection.kind': kind, 'model.moe.num_experts': 4}
  )
  make = lambda: transformer.Transformer(settings.model, rngs=nnx.Rngs(0))
  with jax.enable_x64():
    leaves = jax.tree.leaves(nnx.state(jax.eval_shape(make), nnx.Param))
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
