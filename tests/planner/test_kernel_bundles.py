"""Kernels of a step, found and counted."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mhc import config
from mhc.kernels import api
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.planner import cost
from mhc.planner import hlo
from mhc.planner import kernel_bundles
from mhc.planner import targets
from mhc.training import step

pytestmark = pytest.mark.usefixtures('optax_promotion')

TINY = config.Config(
  model=config.ModelConfig(
    num_blocks=1,
    dim=128,
    ffn_dim=128,
    recompute='none',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
    ),
    # For the sake of the compiler, which unrolls iterations.
    connection=config.ConnectionConfig(sinkhorn_iters=3),
  ),
  data=config.DataConfig(seq_len=128, batch_size=4),
)


def test_kernels_are_found_under_control_flow():
  def program(logits):
    def body(x, _):
      return jax.checkpoint(lambda x: api.sinkhorn(x, 3, 0.0, 'pallas'))(
        x
      ), None

    return jax.lax.scan(body, logits, length=2)[0]

  jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(program(x))))(
    jnp.zeros((4, 4, 16))
  )
  found = {kernel_bundles.key(one)[0] for one in kernel_bundles.kernels(jaxpr)}
  assert found == {'sinkhorn_forward', 'sinkhorn_backward'}


def test_the_name_in_a_program_is_that_of_the_trace():
  text = (
    'HloModule f\n\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  %x = f32[8]{0} parameter(0)\n'
    '  ROOT %transpose_jvp_pre_ = (f32[8]{0:T(8,128)}, bf16[4,2]{1,0}) '
    'custom-call(%x), metadata={op_name="jit(f)/transpose(jvp(pre_backward))/'
    'pallas_call"}\n}\n'
  )
  (*_, call) = hlo.parse(text).computations['main']
  assert cost.kernel_key(call) == ('pre_backward', 'f32[8] bf16[4,2]')


def test_the_kernels_of_a_step_are_counted():
  residual = dataclasses.replace(
    TINY.model, connection=config.ConnectionConfig(kind='residual')
  )
  plain = dataclasses.replace(TINY, model=residual)
  attention = {'attention_forward', 'attention_backward'}
  devices = targets.devices('v5e:2x2')
  mesh = mesh_lib.make_mesh(plain.mesh, plain.data, devices)
  traced = step.Step(Placement(plain, mesh)).trace().jaxpr.jaxpr
  found = {kernel_bundles.key(one) for one in kernel_bundles.kernels(traced)}
  assert {name for name, _ in found} == attention
  found = kernel_bundles.of_step(TINY, 'v5e:2x2')
  names = {name for name, _ in found}
  assert {'advance_forward', 'advance_backward'} | attention <= names
  assert all(number > 100 for number in found.values())
