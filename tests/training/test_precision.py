"""The table of dtypes, read off a traced training step of bfloat16."""

import collections
import functools

import jax
import jax.numpy as jnp
from jaxprs import equations
import pytest

from mhc import config
from mhc import precision
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.training import step

pytestmark = pytest.mark.usefixtures('optax_promotion')

DIM, STREAMS, EXPERTS = 16, 3, 4
SETTINGS = config.Config(
  num_steps=40,
  model=config.ModelConfig(
    num_blocks=2,
    dim=DIM,
    ffn_dim=24,
    dtype='bfloat16',
    recompute='mhc',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=8, rope_dim=4, kv_rank=8
    ),
    connection=config.ConnectionConfig(kind='mhc', num_streams=STREAMS),
    moe=config.MoEConfig(num_experts=EXPERTS, expert_dim=8),
  ),
  data=config.DataConfig(seq_len=12, batch_size=2),
)


@pytest.fixture(scope='module')
def traced():
  mesh = mesh_lib.make_mesh(SETTINGS.mesh, SETTINGS.data)
  compiled = step.Step(Placement(SETTINGS, mesh))
  with jax.numpy_dtype_promotion('standard'):
    jaxpr = jax.make_jaxpr(
      functools.partial(step.train_step, compiled.placement)
    )(
      compiled.abstract_state,
      compiled.abstract_tokens,
      compiled.abstract_inputs,
    )
  return compiled, jaxpr


def test_every_tensor_of_the_table_has_its_dtype(traced):
  _, jaxpr = traced
  seen = collections.defaultdict(set)
  for equation in equations(jaxpr.jaxpr):
    if equation.primitive.name == 'name':
      seen[equation.params['name']].add(equation.outvars[0].aval.dtype)
  dtypes = {
    precision.ACTIVATION: jnp.dtype('bfloat16'),
    precision.FLOAT32: jnp.dtype('float32'),
  }
  assert dict(seen) == {
    name: {dtypes[kind]} for name, kind in precision.TENSORS.items()
  }


def test_state_and_gradients_are_float32(traced):
  compiled, jaxpr = traced
  floats = [
    leaf.dtype
    for leaf in jax.tree.leaves(compiled.abstract_state)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  assert set(floats) == {jnp.dtype('float32')}
  shard_map = next(
    e for e in equations(jaxpr.jaxpr) if e.primitive.name == 'shard_map'
  )
  gradients = [v.aval.dtype for v in shard_map.outvars]
  assert set(gradients) == {jnp.dtype('float32')}


def test_phi_and_router_are_multiplied_in_float32_at_highest(traced):
  """No product has a bfloat16 phi or router, or one of default precision."""
  _, jaxpr = traced
  mapped = STREAMS * (2 + STREAMS)
  shapes = {(STREAMS * DIM, mapped): 0, (DIM, EXPERTS): 0}
  for equation in equations(jaxpr.jaxpr):
    if equation.primitive.name != 'dot_general':
      continue
    avals = [v.aval for v in equation.invars]
    for aval in avals:
      for shape in shapes:
        if aval.shape in (shape, shape[::-1]):
          shapes[shape] += 1
          assert {a.dtype for a in avals} == {jnp.dtype('float32')}
          assert set(equation.params['precision']) == {
            jax.lax.Precision.HIGHEST
          }
  assert all(count >= 2 for count in shapes.values()), shapes


def test_a_mark_refuses_a_narrow_tensor():
  with pytest.raises(AssertionError, match='router_scores'):
    precision.mark('router_scores', jnp.zeros(3, jnp.bfloat16))
  with pytest.raises(KeyError):
    precision.mark('unknown', jnp.zeros(3))
