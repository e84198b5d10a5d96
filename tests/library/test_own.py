"""Connections from outside: what is refused, and what they are in a model."""

import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.connections import own
from mhc.context import Context
from mhc.model import parameters
from mhc.model import transformer


class Scaled(nnx.Module):
  """scale x + y on each stream, without mappings and without `advance`.

  Its `post` has parameters, which those of the next sub-layer must not replace.
  """

  def __init__(self, dim, num_streams, index):
    self.scale = nnx.Param(jnp.full(1, 1.0 + jnp.asarray(index, jnp.float32)))

  def pre(self, x):
    return x.mean(axis=-2), Context(x, None)

  def post(self, y, context):
    return self.scale[...][0] * context.x + y[..., None, :]


class NoPost(nnx.Module):
  def __init__(self, dim, num_streams, index):
    pass

  def pre(self, x):
    return x.mean(axis=-2), Context(x, None)


class Other:
  pass


class Strange(Scaled):
  def __init__(self, dim):
    pass


@pytest.fixture(autouse=True)
def module(monkeypatch):
  module = types.ModuleType('somewhere')
  for each in (Scaled, NoPost, Other, Strange):
    setattr(module, each.__name__, each)
  monkeypatch.setitem(sys.modules, 'somewhere', module)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('nowhere:Scaled', r"'nowhere:Scaled': No module named 'nowhere'.*beside"),
    ('somewhere:Missing', 'somewhere has no Missing'),
    ('somewhere:NoPost', r'has no post: .*post\(y, context\)'),
    ('somewhere:Other', r'is no flax\.nnx\.Module'),
    ('somewhere:Strange', r'cannot be made as Class\(dim, num_streams, index'),
  ],
)
def test_what_is_no_connection_is_refused_in_one_line(kind, message):
  with pytest.raises(ValueError, match=message) as error:
    own.make(kind, 8, 2, 0)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['mhx', 'a:', ':B', 'a b:C', 'a:B:C'])
def test_a_word_that_is_no_kind_is_refused(kind):
  with pytest.raises(ValueError, match=r'connection\.kind='):
    config_lib.ConnectionConfig(kind=kind)


def test_a_setting_that_an_own_class_does_not_take_is_refused():
  with pytest.raises(ValueError, match=r'sinkhorn_iters=3 would not be used'):
    config_lib.ConnectionConfig(kind='somewhere:Scaled', sinkhorn_iters=3)


def model(num_blocks=2):
  settings = config_lib.ModelConfig(
    num_blocks=num_blocks,
    dim=8,
    ffn_dim=8,
    connection=config_lib.ConnectionConfig(
      kind='somewhere:Scaled', num_streams=2
    ),
  )
  return transformer.Transformer(settings, rngs=nnx.Rngs(0))


def test_each_sublayer_is_left_by_its_own_parameters():
  """x grows by 1, 2, 3, 4 where sub-layers return nothing."""
  network = model()
  for part in ('attention', 'ffn'):
    module = getattr(network.dense_blocks, part)
    for leaf in jax.tree.leaves(nnx.state(module)):
      assert leaf.size
    state = jax.tree.map(jnp.zeros_like, nnx.state(module))
    nnx.update(module, state)
  tokens = jnp.arange(3)[None]
  states, _ = network.embed_and_expand(tokens)
  states, _ = network.run_blocks(states, (1, 3), None)
  embedded = network.embed(tokens, jnp.float32).reshape(3, 1, 8)
  want = 24 * jnp.broadcast_to(embedded, states[0].shape)
  np.testing.assert_allclose(states[0], want, rtol=1e-6)
  # A layer that only fills a stage changes nothing.
  states, _ = network.embed_and_expand(tokens)
  after, _ = network.run_blocks(states, (1, 3), None, jnp.array([False, False]))
  np.testing.assert_array_equal(after[0], states[0])


def test_its_parameters_have_a_row():
  _, state = nnx.split(model())
  for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state)):
    found = parameters.row(path)
    assert (found is parameters.OWN) == (path[-1].key == 'scale')
