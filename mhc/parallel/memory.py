r"""Bytes of a training step: by formula before it is compiled, and by XLA.

`check` raises for a run that cannot fit, by the formulas.

A token's activations that are saved for the backward pass, with L sub-layers, n
streams of d numbers and `recompute.peak_stream_units` for Eq. 20, are

    streams   recompute 'none': (n + 2) L d, the streams, H_pre x and its norm
              of every sub-layer (2 L d for the plain residual); else Eq. 20
    outputs   L d, unless everything is recomputed
    inner     the results of the sub-layers' own matrix products: what is kept
              of all of them, and the rest of one recompute block
    logits    v numbers and their gradient, float32; without a pipeline of a
              chunk of the tokens (`chunked_loss`)

Mappings (2n + n^2 float32 numbers a sub-layer) and norms' scales are left out.
"""

import math
import os

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from mhc import config as config_lib
from mhc.config import dicts
from mhc.model import parameters
from mhc.model import recompute
from mhc.model import transformer
from mhc.parallel import chunked_loss
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.pipeline import stage_layout
from mhc.pipeline import table

SIZES = (
  *('vocab_size', 'num_blocks', 'dim', 'ffn_dim', 'num_heads', 'head_dim'),
  *('rope_dim', 'kv_rank', 'query_rank', 'num_kv_heads', 'num_streams'),
  'num_experts',
  *('experts_per_token', 'num_shared', 'expert_dim'),
  *('seq_len', 'batch_size', 'microbatch_size'),
)


def activations(
  model: config_lib.ModelConfig,
  num_blocks: int | None = None,
  expert_devices: int = 1,
) -> dict[str, int]:
  """Bytes a token by the formulas above, of all blocks or the last ones.

  Where experts lie on several devices, the buffer of routed rows has room to
  spare.
  """
  n, dim = model.connection.streams, model.dim
  size = 2 if model.dtype == 'bfloat16' else 4
  num_blocks = num_blocks or model.num_blocks
  sublayers = 2 * num_blocks
  every = recompute.recompute_interval(model, num_blocks)
  if model.recompute == 'none':
    streams = (n + 2 if n > 1 else 2) * sublayers
  else:
    streams = recompute.peak_stream_units(sublayers, n, every)
  # The sum x + y of a plain residual needs no y for its gradient.
  outputs = 0 if n == 1 and model.recompute == 'none' else sublayers
  dense = _attention(model.attention) + _hidden(model) * model.ffn_dim
  inner = [(dense, 0)] * (model.num_blocks - model.num_moe_blocks)
  inner += [_with_experts(model, expert_devices)] * model.num_moe_blocks
  others, routed = (
    sum(part) for part in zip(*inner[-num_blocks:], strict=True)
  )
  largest = max(map(sum, inner[-num_blocks:]))
  match model.recompute:
    case 'none' | 'mhc':
      at_once = others + routed
    case 'mhc+experts':
      at_once = others + routed * (every // 2) // num_blocks
    case 'mhc+block' | 'full':
      at_once = largest * (every // 2)
  return {
    'streams': size * dim * streams,
    'outputs': 0 if model.recompute == 'full' else size * dim * outputs,
    'inner': size * at_once,
    'logits': 2 * 4 * model.vocab_size,
  }


def predicted(config: config_lib.Config, num_devices: int) -> dict[str, int]:
  """Bytes of activations on a device, by kind, for the rows taken at a time.

  In a pipeline they are those of a stage, and `stages`: the inputs of stages,
  and gradients, in the buffer slots of the schedule; with mesh.keep='stages'
  also `kept`, the activations of the stages between F and B.
  """
  model, data, mesh = config.model, config.data, config.mesh
  dp_size = num_devices // mesh.pipe
  rows = data.microbatch_size or data.batch_size // dp_size
  tokens = rows * data.seq_len
  if mesh.pipe == 1:
    kinds = activations(model, expert_devices=mesh.expert)
  else:
    layout = stage_layout.for_model(model, mesh)
    kinds = activations(model, layout.layers_per_stage, mesh.expert)
    number = mesh_lib.num_microbatches(mesh, data, dp_size)
    schedule = table.for_mesh(mesh, number)
    size = 2 if model.dtype == 'bfloat16' else 4
    state = size * (
      model.connection.streams * model.dim + model.attention.carried_values
    )
    kinds['stages'] = table.peak_states(schedule) * state
    if mesh.keep == 'stages':
      each = kinds['streams'] + kinds['outputs'] + kinds['inner'] + state
      kinds['kept'] = schedule.num_kept_slots * each
    if mesh.head == 'vocab':
      kinds['logits'] //= mesh.pipe
  found = {name: size * tokens for name, size in kinds.items()}
  if mesh.pipe == 1:
    found['logits'] //= chunked_loss.num_chunks(tokens, model.vocab_size)
  return found


def check(config: config_lib.Config, mesh: Mesh):
  """Raises ValueError if a lower bound of a step's memory exceeds a device's.

  The bound counts parameters, their gradients, the optimiser's moments, and the
  activations of `predicted`. CPU devices share host memory.
  """
  room = _room(mesh)
  if room is None:
    return
  state = _state(config, mesh)
  # The activations of a model that is much too large would take long to count.
  kept = 0 if state > room else sum(predicted(config, mesh.size).values())
  if state + kept <= room:
    return
  ours, usual = (_sizes(one) for one in (config, config_lib.Config()))
  largest = sorted(ours, key=lambda name: -ours[name] / max(1, usual[name]))
  named = ', '.join(f'{name}={ours[name]}' for name in largest[:4])
  raise ValueError(
    f'The run needs at least {(state + kept) / 2**30:,.1f} GiB per device '
    f'(parameters and optimiser {state / 2**30:,.1f}, activations '
    f'{kept / 2**30:,.1f}); a {mesh.devices.flat[0].platform} device has '
    f'{room / 2**30:,.1f} GiB. Reduce {named}, ... or use more devices.'
  )


def _room(mesh):
  """Bytes of a device's memory, None if unknown."""
  device = mesh.devices.flat[0]
  if device not in jax.local_devices():
    return None
  if device.platform == 'cpu':
    sharing = len(mesh.local_devices)
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // sharing
  return (device.memory_stats() or {}).get('bytes_limit')


def _state(config, mesh):
  """Bytes per device: parameters, gradients, moments (Muon has one)."""
  model = config.model
  _, shapes = transformer.abstract(model)
  copies = 3 if config.optimizer.name == 'muon' else 4

  def leaf(path, shape):
    names = parameters.path_names(path)
    axes = partition.spec(names, model.stack, config.mesh.head)
    ways = math.prod(mesh.shape[axis] for axis in axes if axis)
    return math.prod(shape.shape) * copies * 4 // ways

  return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(leaf, shapes)))


def _sizes(config):
  """Returns the settings that determine the sizes of arrays."""
  flat = dicts.leaves({'model': config.model, 'data': config.data})
  return {
    name: value
    for name, value in flat.items()
    if name.rpartition('.')[2] in SIZES
  }


def compile_gradient(
  model: config_lib.ModelConfig, batch_size: int, seq_len: int
) -> jax.stages.Compiled:
  """Compiles the gradient of a model's loss, without an update or a mesh."""
  graphdef, params = transformer.abstract(model)
  bias = transformer.abstract_router_bias(model)
  tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)

  def loss(params, bias, tokens):
    logits = nnx.merge(graphdef, nnx.State(params))(tokens, bias)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(nats)

  return jax.jit(jax.grad(loss)).lower(params, bias, tokens).compile()


def peak_bytes(memory) -> int:
  """Peak on one device; `memory` is the analysis of a compiled program."""
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _attention(c):
  carried = c.carried_values
  if c.kind == 'gqa':  # queries, what is mixed, keys and values
    return carried + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
  heads = c.num_heads * (c.head_dim + c.rope_dim)
  compressed = 2 * c.query_rank  # and its norm
  latent = 2 * c.kv_rank + c.rope_dim
  expanded = 3 * c.num_heads * c.head_dim  # keys, values, what is mixed
  return carried + compressed + heads + latent + expanded


def _hidden(model):
  """Rows of a SwiGLU's hidden width: gate, up and, if kept, their product."""
  return 2 if model.recompute in ('mhc', 'mhc+experts') else 3


def _with_experts(model, devices):
  """A block's own numbers a token, and those of the routed experts.

  Hidden rows; kept ones also with what goes in, and gated products.
  """
  c, hidden = model.moe, _hidden(model)
  routed = hidden * c.expert_dim
  routed += 0 if model.recompute == 'mhc' else c.expert_dim + model.dim
  shared = hidden * c.num_shared * c.expert_dim
  rows = c.experts_per_token
  if devices > 1 and c.dispatch == 'dropless':
    most = devices * min(rows, c.num_experts // devices)
    rows = min(most, rows * c.buffer_factor)
  return _attention(model.attention) + shared, int(rows * routed)
