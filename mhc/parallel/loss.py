"""The loss, its gradient and what a probe sees, inside a `shard_map`.

Of a mesh without a pipeline a device takes its rows of the batch through the
whole network, microbatch by microbatch, and puts each block's matrices together
when it comes to it. A pipeline does so once, before its first microbatch, for
the blocks of its own stages (`pipeline`). Either way gradients come out as sums
over all devices, each device with its own part.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from mhc import axes
from mhc import config as config_lib
from mhc import precision
from mhc.model import transformer
from mhc.parallel import fsdp
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import vocab_parallel
from mhc.pipeline import executor
from mhc.pipeline import stage_layout
from mhc.pipeline import table as table_lib

AXES = mesh_lib.AXES


class Local(NamedTuple):
  """Functions of (params, router_bias, tokens), which are the device's parts.

  loss_and_grads: tokens int32 [b, t + 1] -> the mean loss of the whole batch,
    its gradient, and of every expert layer, placed, load [l, e] and the share
    of dropped assignments [l]; None without experts.
  row_nats: tokens int32 [b, t + 1] -> the summed loss of every row, [b].
  sites: tokens int32 [1, t], the same on all devices -> `connections.Site` of
    the sub-layers, [l, 2, t, ...]: of the blocks that a pipeline is cut from,
    placed, and of those before, None if there are none.
  """

  loss_and_grads: Callable
  row_nats: Callable
  sites: Callable


def network(model: config_lib.ModelConfig) -> Callable:
  """Parameters as nested dict -> the network that has them."""
  create = lambda: transformer.Transformer(model, rngs=nnx.Rngs(0))
  graphdef, _ = nnx.split(nnx.eval_shape(create))
  return lambda params: nnx.merge(graphdef, nnx.State(params))


def build(
  model: config_lib.ModelConfig,
  data: config_lib.DataConfig,
  config: config_lib.MeshConfig,
  mesh: Mesh,
  specs,
  layout: stage_layout.Layout,
  *,
  pollute: bool = False,
) -> Local:
  """The functions on `mesh`, for parameters that lie by `specs`.

  `pollute` is for tests, see `pipeline.gradients`.
  """
  # Every argument varies over the mesh: the local gradient comes first, then
  # one sum over devices, where autodiff would sum at every use of a parameter.
  made = (
    _whole(model, data, config.parts, specs)
    if config.pipe == 1
    else _piped(model, data, config, specs, layout, pollute)
  )
  scale = 1 / (data.batch_size * data.seq_len)
  number = mesh_lib.num_microbatches(config, data, mesh.size // config.pipe)

  def loss_and_grads(*parts):
    nats, grads, stats = made.loss_and_grads(*mesh_lib.varying(parts))
    grads = jax.tree.map(lambda leaf: leaf * scale, grads)
    load = None
    if stats is not None:
      over = (mesh_lib.DATA, mesh_lib.EXPERT)
      stats = mesh_lib.varying(stats)
      load = (
        jax.lax.psum(stats.load, over),
        jax.lax.pmean(stats.dropped, over) / number,
      )
      if config.pipe == 1:
        load = jax.tree.map(lambda leaf: _same(leaf, (mesh_lib.PIPE,)), load)
    return jax.lax.psum(nats, AXES) * scale, grads, load

  def row_nats(*parts):
    nats = made.row_nats(*mesh_lib.varying(parts))
    return _same(nats, (mesh_lib.PIPE,))

  def sites(*parts):
    stack, before = made.sites(*mesh_lib.varying(parts))
    if before is not None:
      before = _same(before, AXES)
    over = AXES if config.pipe == 1 else (mesh_lib.DATA, mesh_lib.EXPERT)
    return _same(stack, over), before

  return Local(loss_and_grads, row_nats, sites)


def _balance(model, stats, num_rows, seq_len):
  """What a microbatch adds to the summed loss to be differentiated."""
  if not model.moe.balance_loss:
    return jnp.zeros(())
  weight = model.moe.balance_loss * num_rows * seq_len
  return weight * jnp.sum(stats.balance_loss)


def _nats(logits, targets):
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return precision.mark('loss', jnp.sum(nats, axis=1))


def _same(tree, over):
  """What all devices along those axes agree on, as one value."""
  return jax.tree.map(lambda x: jax.lax.pmean(x, over), tree)


def _whole(model, data, parts, specs) -> Local:
  """Without a pipeline."""
  merge = network(model)

  def whole_block(name, block):
    graphdef, params = nnx.split(block)
    # The scan over blocks has taken the first dimension away.
    inner = jax.tree.map(
      lambda spec: mesh_lib.PartitionSpec(*spec[1:]), specs[name]
    )
    params = fsdp.gather(nnx.to_pure_dict(params), inner, model.dtype)
    return nnx.merge(graphdef, nnx.State(params))

  def ready(params):
    """The network, and how its blocks are put together."""
    if jax.lax.axis_size(mesh_lib.DATA) == 1:
      return merge(params), {}
    stacks = {k: v for k, v in params.items() if k.endswith('_blocks')}
    others = {k: v for k, v in params.items() if k not in stacks}
    around = {k: specs[k] for k in others}
    others = fsdp.gather(others, around, model.dtype)
    return merge(stacks | others), {'whole': whole_block}

  def nats_and_stats(params, router_bias, tokens):
    net, how = ready(params)
    logits, stats = net.logits_and_stats(
      tokens[:, :-1], router_bias, parts=parts, **how
    )
    return _nats(logits, tokens[:, 1:]), stats

  def gradient(params, router_bias, tokens):
    """Of the sum over local tokens, with that sum and the experts' loads."""

    def objective(params):
      rows, stats = nats_and_stats(params, router_bias, tokens)
      nats = total = jnp.sum(rows)
      if stats is not None:
        total += _balance(model, stats, rows.size, data.seq_len)
      return total, (nats, stats)

    grads, (nats, stats) = jax.grad(objective, has_aux=True)(params)
    return nats, grads, stats

  def loss_and_grads(params, router_bias, tokens):
    microbatches = mesh_lib.microbatches(tokens, data)
    if len(microbatches) == 1:
      nats, grads, stats = gradient(params, router_bias, tokens)
    else:
      zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, router_bias, microbatches[0]),
      )

      def add(total, part):
        one = gradient(params, router_bias, part)
        return jax.tree.map(jnp.add, total, one), None

      zeros = mesh_lib.varying(zeros)
      (nats, grads, stats), _ = jax.lax.scan(add, zeros, microbatches)
    return nats, jax.tree.map(fsdp.over_others, grads, specs), stats

  def row_nats(params, router_bias, tokens):
    def score(part):
      return nats_and_stats(params, router_bias, part)[0]

    microbatches = mesh_lib.microbatches(tokens, data)
    if len(microbatches) == 1:
      return score(tokens)
    return jax.lax.map(score, microbatches).reshape(-1)

  def sites(params, router_bias, tokens):
    net, how = ready(params)
    made = net.sites(tokens, router_bias, **how)
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), made), None

  return Local(loss_and_grads, row_nats, sites)


def _piped(model, data, config, specs, layout, pollute) -> Local:
  """With a pipeline."""
  merge, stack = network(model), model.stack
  size = (layout.placement, layout.num_devices, layout.num_chunks)
  is_block = None if (layout.order >= 0).all() else layout.order >= 0

  def ready(params, router_bias, tokens, collect=False):
    """Stages and parts of this device, its matrices put together."""
    params = fsdp.gather(params, specs, model.dtype)
    shared = {k: v for k, v in params.items() if k != stack}
    blocks = params[stack]
    batch = (tokens.shape[1], tokens.shape[2] - 1)
    parts = 1 if collect else config.parts

    def net(shared=shared, blocks=blocks):
      return merge(shared | {stack: blocks})

    def run(blocks, bias, active, state):
      y, aux = net(blocks=blocks).stage(
        state, batch, bias, active, collect=collect
      )
      extra = jnp.zeros(())
      if aux.stats is not None:
        extra = _balance(model, aux.stats, *batch)
      extra = axes.vary(extra, axes.over(y))
      return y, extra, aux.contexts if collect else aux.stats

    def score(shared, h, targets):
      if config.head == 'vocab':
        weight = shared['head']['weight']
        nats = vocab_parallel.cross_entropy(h, weight, targets.reshape(-1))
        return jnp.sum(nats.reshape(targets.shape), axis=1)
      return _nats(net(shared).logits(h, targets.shape), targets)

    stages = executor.Stages(
      open=lambda shared, tokens: net(shared).open(tokens, parts=parts)[0],
      run=run,
      close=lambda shared, state: net(shared).close(state),
      score=score,
    )
    active = is_block
    if active is not None:
      rows = jnp.asarray(active).reshape(layout.num_devices, -1)
      active = rows[jax.lax.axis_index(mesh_lib.PIPE)]
    return stages, executor.Parts(blocks, router_bias, active, shared, tokens)

  def forward(params, router_bias, tokens, **how):
    stages, parts = ready(params, router_bias, tokens, **how)
    schedule = table_lib.build_forward(*size, len(tokens))
    return executor.forward(schedule, stages, parts)

  def loss_and_grads(params, router_bias, tokens):
    tokens = mesh_lib.microbatches(tokens, data)
    stages, parts = ready(params, router_bias, tokens)
    schedule = mesh_lib.schedule_of(config, len(tokens))
    sums = executor.gradients(schedule, stages, parts, pollute=pollute)
    grads = fsdp.scatter(sums.shared | {stack: sums.blocks}, specs)
    return sums.nats, grads, sums.stats

  def row_nats(params, router_bias, tokens):
    tokens = mesh_lib.microbatches(tokens, data)
    return forward(params, router_bias, tokens)[0].reshape(-1)

  def sites(params, router_bias, tokens):
    whole = merge(fsdp.gather(params, specs, model.dtype))
    aux = whole.open(tokens, collect=True)[1]
    before = None if aux is None else aux.contexts
    # Nothing is predicted from the last token.
    tokens = jnp.pad(tokens, ((0, 0), (0, 1)))[None]
    stack = forward(params, router_bias, tokens, collect=True)[1]
    return jax.tree.map(lambda x: x[:, 0], stack), before

  return Local(loss_and_grads, row_nats, sites)
