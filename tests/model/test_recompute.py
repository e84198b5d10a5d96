"""The paper's optimum, and what each policy keeps of a compiled gradient."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxprs import equations
import numpy as np
import pytest

from mhc import config
from mhc.model import recompute
from mhc.model import transformer
from mhc.parallel import memory


@pytest.mark.parametrize(
  ('num_sublayers', 'every', 'peak'),
  [(60, 6, 76), (36, 4, 60), (24, 4, 48)],
)
def test_equation_20(num_sublayers, every, peak):
  assert recompute.optimal_interval(num_sublayers, 4) == every
  assert recompute.peak_stream_units(num_sublayers, 4, every) == peak
  continuous = (4 * num_sublayers / 6) ** 0.5
  assert abs(every - continuous) < 2


# 16 blocks, 32 sub-layers: L_r* = 4 (of even L_r).
BASE = config.ModelConfig(num_blocks=16, dim=256, ffn_dim=512)
TOKENS = (64, 64)


@functools.cache
def temporary_units(policy, every=4, kind='mhc'):
  """XLA's temporary bytes of a gradient, in d float32 numbers a token."""
  settings = dataclasses.replace(
    BASE,
    recompute=policy,
    recompute_every=every,
    # What is kept does not depend on the iterations, which are compiled.
    connection=config.ConnectionConfig(kind=kind, sinkhorn_iters=3),
  )
  compiled = memory.compile_gradient(settings, *TOKENS)
  unit = math.prod(TOKENS) * BASE.dim * 4
  return compiled.memory_analysis().temp_size_in_bytes / unit


def test_without_recomputation_mhc_adds_n_plus_2_tensors_a_sublayer():
  """Streams, H_pre x and y against x; both have its norm."""
  extra = temporary_units('none') - temporary_units('none', kind='residual')
  assert extra == pytest.approx((4 + 1 + 1) * 32, rel=0.1)


def test_the_plan_saves_the_stream_tensors_that_the_formula_says():
  """none keeps (n + 2) L, the plan Eq. 20; outputs and F's own are the same."""
  saved = temporary_units('none') - temporary_units('mhc')
  predicted = (4 + 2) * 32 - recompute.peak_stream_units(32, 4, 4)
  assert predicted == 136
  assert saved == pytest.approx(predicted, rel=0.2)


@pytest.mark.slow
def test_each_policy_keeps_less():
  none, mhc, block, full = map(
    temporary_units, ('none', 'mhc', 'mhc+block', 'full')
  )
  assert none > 1.4 * mhc
  assert mhc > 1.4 * block > 1.4 * full


@pytest.mark.slow
def test_the_best_interval_is_at_or_beside_the_papers():
  assert recompute.optimal_interval(32, 4) == 4
  measured = {every: temporary_units('mhc', every) for every in (2, 4, 8)}
  assert min(measured, key=measured.get) in (2, 4)
  assert measured[8] > measured[4]


def test_predicted_activations_are_most_of_what_xla_takes():
  """The rest is the block whose gradient is being computed."""
  for policy in ('none', 'mhc'):
    settings = dataclasses.replace(BASE, recompute=policy, recompute_every=4)
    predicted = sum(memory.activations(settings).values()) / (4 * BASE.dim)
    assert 0.7 < predicted / temporary_units(policy) < 1


def test_routed_rows_are_kept_or_not_and_change_no_gradient():
  found = {policy: of_experts(policy) for policy in ('mhc', 'mhc+experts')}
  (rows, one), (none, other) = found.values()
  assert rows
  assert not none
  for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def of_experts(policy):
  """Shapes of hidden rows that a scan keeps of three blocks; the gradient."""
  width = 24
  settings = config.ModelConfig(
    num_blocks=3,
    dim=16,
    recompute=policy,
    attention=config.AttentionConfig(
      num_heads=1, head_dim=8, rope_dim=4, kv_rank=8
    ),
    connection=config.ConnectionConfig(kind='residual'),
    moe=config.MoEConfig(
      num_experts=4, expert_dim=width, num_shared=0, num_dense_blocks=0
    ),
  )
  model = transformer.Transformer(settings, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model)
  bias = jnp.zeros((3, 4), jnp.float32)
  tokens = jnp.arange(32).reshape(2, 16)
  gradient = jax.grad(
    lambda params: jnp.mean(jnp.sin(nnx.merge(graph, params)(tokens, bias)))
  )
  traced = jax.make_jaxpr(gradient)(params)
  weights = {(3, *leaf.shape[1:]) for leaf in jax.tree.leaves(params)}
  kept = {
    out.aval.shape
    for equation in equations(traced.jaxpr)
    if equation.primitive.name == 'scan'
    for out in equation.outvars
    if out.aval.shape[0:1] == (3,) and out.aval.shape[-1] == width
  }
  return kept - weights, jax.jit(gradient)(params)
