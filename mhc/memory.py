r"""Bytes of a training step: by formula before it is compiled, and by XLA.

A token's activations that are kept for the backward pass, with L sub-layers, n
streams of d numbers and `recompute.kept` for Eq. 20, come as

    streams   recompute 'none': (n + 2) L d, the streams, H_pre x and its norm
              of every sub-layer (2 L d for the plain residual); else Eq. 20
    outputs   L d, unless everything is computed again
    inner     the results of the sub-layers' own matrix products, of all of
              them or of one recompute block
    logits    v numbers and their gradient, float32

Mappings (2n + n^2 float32 numbers a sub-layer) and norms' scales are left out.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from mhc import config as config_lib
from mhc import layout
from mhc import recompute
from mhc import schedule
from mhc import sharding
from mhc import transformer


def activations(
  model: config_lib.ModelConfig, num_blocks: int | None = None
) -> dict[str, int]:
  """Bytes a token by the formulas above, of all blocks or the last of them."""
  n, dim = model.connection.streams, model.dim
  size = 2 if model.dtype == 'bfloat16' else 4
  num_blocks = num_blocks or model.num_blocks
  sublayers = 2 * num_blocks
  every = recompute.interval(model, num_blocks)
  if model.recompute == 'none':
    streams = (n + 2 if n > 1 else 2) * sublayers
  else:
    streams = recompute.kept(sublayers, n, every)
  # The sum x + y of a plain residual needs no y for its gradient.
  outputs = 0 if n == 1 and model.recompute == 'none' else sublayers
  inner = [
    _attention(model.attention)
    + (_experts(model) if experts else 3 * model.ffn_dim)
    for experts in (False,) * (model.num_blocks - model.num_moe_blocks)
    + (True,) * model.num_moe_blocks
  ][-num_blocks:]
  match model.recompute:
    case 'none' | 'mhc':
      at_once = sum(inner)
    case 'mhc+block' | 'full':
      at_once = max(inner) * (every // 2)
  return {
    'streams': size * dim * streams,
    'outputs': 0 if model.recompute == 'full' else size * dim * outputs,
    'inner': size * at_once,
    'logits': 2 * 4 * model.vocab_size,
  }


def predicted(config: config_lib.Config, num_devices: int) -> dict[str, int]:
  """Bytes of activations on a device, by kind: of the rows taken at a time.

  In a pipeline these are those of a stage, and `stages`: the inputs of stages,
  and gradients, that wait in the slots of the schedule.
  """
  model, data, mesh = config.model, config.data, config.mesh
  ways = num_devices // mesh.pipe
  rows = data.microbatch_size or data.batch_size // ways
  tokens = rows * data.seq_len
  if mesh.pipe == 1:
    kinds = activations(model)
  else:
    stages = layout.of(model, mesh)
    kinds = activations(model, stages.rows)
    number = sharding.num_microbatches(mesh, data, ways)
    table = sharding.schedule_of(mesh, number)
    size = 2 if model.dtype == 'bfloat16' else 4
    state = size * model.connection.streams * model.dim
    kinds['stages'] = schedule.peak_states(table) * state
    if mesh.head == 'vocab':
      kinds['logits'] //= mesh.pipe
  return {name: size * tokens for name, size in kinds.items()}


def compile_gradient(
  model: config_lib.ModelConfig, batch_size: int, seq_len: int
) -> jax.stages.Compiled:
  """The gradient of a model's loss alone, without an update or devices."""
  create = functools.partial(transformer.Transformer, model)
  graphdef, params = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))
  bias = None
  if model.num_moe_blocks:
    shape = (model.num_moe_blocks, model.moe.num_experts)
    bias = jax.ShapeDtypeStruct(shape, jnp.float32)
  tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)

  def loss(params, bias, tokens):
    logits = nnx.merge(graphdef, params)(tokens, bias)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(nats)

  return jax.jit(jax.grad(loss)).lower(params, bias, tokens).compile()


def peak_bytes(memory) -> int:
  """On one device; `memory` is what a compiled program's analysis says."""
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _attention(c):
  heads = c.num_heads * (c.head_dim + c.rope_dim)
  compressed = 2 * c.query_rank  # and its norm
  latent = 2 * c.kv_rank + c.rope_dim
  expanded = 3 * c.num_heads * c.head_dim  # keys, values, what is mixed
  return compressed + heads + latent + expanded


def _experts(model):
  """Gate, up and their product; what the experts take and return."""
  c = model.moe
  routed = c.experts_per_token * (3 * c.expert_dim + 2 * model.dim)
  return routed + 3 * c.num_shared * c.expert_dim
