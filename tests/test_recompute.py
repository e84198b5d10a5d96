"""The paper's optimum, and what each policy keeps of a compiled gradient."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from mhc import config
from mhc import recompute
from mhc import transformer


@pytest.mark.parametrize(
  ('num_sublayers', 'every', 'peak'),
  [(60, 6, 76), (36, 4, 60), (24, 4, 48)],
)
def test_equation_20(num_sublayers, every, peak):
  assert recompute.best_every(num_sublayers, 4) == every
  assert recompute.kept(num_sublayers, 4, every) == peak
  continuous = (4 * num_sublayers / 6) ** 0.5
  assert abs(every - continuous) < 2


BASE = config.ModelConfig(num_blocks=8, dim=128, ffn_dim=128)
UNIT = 4 * 64 * 128 * 4  # bytes of d float32 numbers for each token


def temporary_units(**changes):
  settings = dataclasses.replace(BASE, **changes)
  graphdef, params = nnx.split(
    nnx.eval_shape(lambda: transformer.Transformer(settings, rngs=nnx.Rngs(0)))
  )
  tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

  def loss(params, tokens):
    return jnp.sum(nnx.merge(graphdef, params)(tokens))

  compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  return compiled.memory_analysis().temp_size_in_bytes / UNIT


def test_without_recomputation_mhc_adds_n_plus_2_tensors_a_sublayer():
  """The streams are kept in one copy, as Eq. 20 counts them."""
  plain = config.ConnectionConfig(kind='residual')
  extra = temporary_units(recompute='none') - temporary_units(
    recompute='none', connection=plain
  )
  assert extra == pytest.approx((4 + 2) * 16, rel=0.35)


def test_each_policy_keeps_less():
  none, mhc, block, full = (
    temporary_units(recompute=policy, recompute_every=4)
    for policy in ('none', 'mhc', 'mhc+block', 'full')
  )
  assert none > 1.3 * mhc
  assert mhc > block > full


def test_the_best_interval_is_near_the_papers():
  """L = 16, n = 4: L_r* = 4 by Eq. 20 (even L_r)."""
  measured = {
    every: temporary_units(recompute='mhc', recompute_every=every)
    for every in (2, 4, 8, 16)
  }
  best = min(measured, key=measured.get)
  assert best in (2, 4)
  assert measured[16] > measured[8] > measured[4]
