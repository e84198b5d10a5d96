"""Kernels of a step, found and counted."""

import dataclasses

import jax
import jax.numpy as jnp

from mhc import config
from mhc.kernels import api
from mhc.planner import cost
from mhc.planner import hlo
from mhc.planner import kernel_bundles

TINY = config.Config(
  model=config.ModelConfig(
    num_blocks=1,
    dim=128,
    ffn_dim=128,
    recompute='none',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
    ),
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
  found = kernel_bundles.of_step(plain, 'v5e:2x2')
  assert {name for name, _ in found} == attention
  found = kernel_bundles.of_step(TINY, 'v5e:2x2')
  names = {name for name, _ in found}
  assert {'advance_forward', 'advance_backward'} | attention <= names
  assert all(number > 100 for number in found.values())
