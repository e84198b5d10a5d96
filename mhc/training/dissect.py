r"""What a trained model uses of its streams: its loss with parts replaced.

Without any training, the held-out rows are scored again with

    stream j := 0            at the entry of each block, also for the mappings
    H_res := I               nothing mixed
    H_res := mean            over the tokens that are scored, of each sub-layer
    H_res := 11^T / n        all mixed
    H_res := I, upper half   of the sub-layers

Differences are of the same rows, and so is their standard error: what rows
differ in is not in it. They are of this model, not of one that was trained so.

The connections of the restored model are put into `Intervened` ones, on one
device and in plain JAX; training does not know of them.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mhc import config as config_lib
from mhc.connections import StreamsWithPre
from mhc.data import batches
from mhc.data import mixture as mixture_lib
from mhc.functional import Context
from mhc.model import residual
from mhc.model import transformer
from mhc.parallel import loss
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import state as state_lib
from mhc.training import workdir as workdir_lib


class Intervention(NamedTuple):
  """What is replaced in a model of L sub-layers; arrays, so that one compiles.

  Of sub-layer l, H_res is `by[l]` for every token where `replaced[l]`. At the
  entry of each block stream j is multiplied by `keep[j]`, 1 or 0.
  """

  keep: Float[Array, 'n']
  replaced: Bool[Array, 'L']
  by: Float[Array, 'L n n']


class Intervened(nnx.Module):
  """A connection, stacked over l blocks, with an intervention.

  `connection` but for what `pre` takes, which is called at the entry of a
  block (kernels that defer `post` call `advance` there: `model_config`), and
  for the H_res of its context.
  """

  def __init__(
    self,
    connection: residual.Connection,
    keep: Float[Array, 'l n'],
    replaced: Bool[Array, 'l'],
    by: Float[Array, 'l n n'],
  ):
    self.connection = connection
    self.keep = nnx.Variable(keep)
    self.replaced = nnx.Variable(replaced)
    self.by = nnx.Variable(by)

  def pre(
    self, x: Float[Array, '*batch n d'] | StreamsWithPre
  ) -> tuple[Float[Array, '*batch d'], Context]:
    if isinstance(x, StreamsWithPre):
      x = x._replace(x=self._kept(x.x))
    else:
      x = self._kept(x)
    return self._with_replaced(*self.connection.pre(x))

  def post(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> Float[Array, '*batch n d'] | StreamsWithPre:
    return self.connection.post(y, context)

  def advance(
    self, y: Float[Array, '*batch d'], context: Context
  ) -> tuple[Float[Array, '*batch d'], Context]:
    return self._with_replaced(*self.connection.advance(y, context))

  def _kept(self, x):
    keep = self.keep[...].astype(x.dtype)
    return x * keep.reshape((1,) * (x.ndim - 2) + (-1, 1))

  def _with_replaced(self, h, context):
    mappings, by = context.mappings, self.by[...][..., None]
    res = jnp.eye(len(by))[..., None] if mappings.res is None else mappings.res
    res = jnp.where(self.replaced[...], by, res)
    res = jnp.broadcast_to(res, (*by.shape[:2], mappings.pre.shape[1]))
    return h, context._replace(mappings=mappings._replace(res=res))


def interventions(
  means: Float[Array, 'L n n'],
) -> Iterator[tuple[str, Intervention]]:
  """Yields them by name, the trained model first.

  Args:
    means: H_res of each sub-layer, averaged over tokens.
  """
  number, n, _ = means.shape
  ones, none, every = jnp.ones(n), jnp.zeros(number, bool), jnp.ones(number)
  every = every.astype(bool)
  identity = jnp.broadcast_to(jnp.eye(n), means.shape)
  yield 'as trained', Intervention(ones, none, means)
  for stream in range(n):
    keep = ones.at[stream].set(0)
    yield f'stream {stream} := 0', Intervention(keep, none, means)
  yield 'H_res := I', Intervention(ones, every, identity)
  yield 'H_res := mean', Intervention(ones, every, means)
  uniform = jnp.full(means.shape, 1 / n)
  yield 'H_res := 11^T / n', Intervention(ones, every, uniform)
  upper = jnp.arange(number) >= number // 2
  yield 'H_res := I, upper half', Intervention(ones, upper, identity)


def intervene(model: transformer.Transformer, intervention: Intervention):
  """Puts the model's connections into `Intervened` ones."""
  first = 0
  for stack in (model.dense_blocks, model.moe_blocks):
    if stack is None:
      continue
    last = first + len(jax.tree.leaves(stack)[0])
    for sublayer, name in enumerate(('attention_connection', 'ffn_connection')):
      part = slice(2 * first + sublayer, 2 * last, 2)
      keep = intervention.keep[None]
      changed = Intervened(
        getattr(stack, name),
        jnp.broadcast_to(keep, (last - first, keep.size)),
        intervention.replaced[part],
        intervention.by[part],
      )
      setattr(stack, name, changed)
    first = last


def model_config(config: config_lib.Config) -> config_lib.ModelConfig:
  """The run's model in plain JAX, whose blocks hand on written streams.

  Raises:
    ValueError: it has no n streams that an n x n matrix mixes.
  """
  connection = config.model.connection
  others = ('residual', 'frac', 'wide_residual', *config_lib.DEPTH_KINDS)
  if connection.kind in others or connection.is_own:
    raise ValueError(
      f'connection.kind={connection.kind!r} has no n x n mappings of n streams '
      'to replace: give the --workdir of a run of another kind, such as mhc'
    )
  connection = dataclasses.replace(connection, implementation='xla')
  return dataclasses.replace(config.model, connection=connection)


def dissect(
  graphdef: nnx.GraphDef,
  state: state_lib.TrainState,
  rows: Int[np.ndarray, 'r t1'],
  batch_size: int,
) -> dict[str, Float[np.ndarray, 'r']]:
  """Nats a token of each row under each intervention, by its name.

  Args:
    graphdef: of a model of `model_config`.
    state: its parameters, in order of depth, and router's biases.
    rows: int32, t + 1 tokens each.
    batch_size: rows to score at a time.
  """
  parts = [*_parts(rows, batch_size)]
  num_targets = np.sum(rows[:, 1:] >= 0, axis=1)
  model = (state.params, state.router_bias)
  mean = _of_rows(jax.jit(functools.partial(_mean_res, graphdef)), model, parts)
  score = jax.jit(functools.partial(_nats, graphdef))
  changes = interventions(jnp.asarray(mean.mean(axis=0), jnp.float32))
  return {
    name: _of_rows(score, model, parts, change) / num_targets
    for name, change in changes
  }


def dissect_checkpoint(workdir: paths.Path, num_rows: int) -> dict:
  """Dissects the newest checkpoint of the run in `workdir`, on one device.

  Args:
    workdir: the work directory of the run; its mesh is ignored.
    num_rows: held-out rows to score, at least 2.

  Returns:
    what was scored, and `interventions`, one a dict: name, nats a token and,
    but for the first, their difference to it and its standard error over rows.

  Raises:
    ValueError, OSError: there is no run, no checkpoint or nothing to replace,
      or unusable text.
  """
  config = workdir_lib.read_config(workdir)
  graphdef, _ = transformer.abstract(model_config(config))
  state = checkpoint.restore_model(workdir)
  mixture = mixture_lib.load(config)
  rows, _ = batches.heldout_rows(
    mixture, config.data, num_rows, config.model.vocab_size
  )
  size = config.data.microbatch_size or config.data.batch_size
  nats = dissect(graphdef, state, rows, size)
  return {
    'step': int(state.step),
    'kind': config.model.connection.kind,
    'rows': len(rows),
    'corpus': ', '.join(corpus.name for corpus in mixture.corpora),
    'interventions': _compared(nats),
  }


def _compared(nats):
  """Means, and those of paired differences to the first with their errors."""
  trained = nats['as trained']
  found = []
  for name, values in nats.items():
    row = {'name': name, 'nats': float(np.mean(values))}
    if values is not trained:
      change, count = values - trained, len(values)
      row['difference'] = float(np.mean(change))
      row['standard_error'] = (
        float(np.std(change, ddof=1) / math.sqrt(count)) if count > 1 else None
      )
    found.append(row)
  return found


def _parts(rows, size):
  """Yields `size` rows at a time, and how many of them are not padding."""
  for start in range(0, len(rows), size):
    part = rows[start : start + size]
    padding = ((0, size - len(part)), (0, 0))
    yield jnp.asarray(np.pad(part, padding)), len(part)


def _of_rows(function, model, parts, *arguments):
  """What a function of a model and tokens gives for each row, float64."""
  found = [
    np.asarray(function(*model, tokens, *arguments), np.float64)[:size]
    for tokens, size in parts
  ]
  return np.concatenate(found)


def _nats(graphdef, params, router_bias, tokens, intervention):
  """The summed loss of each row, [b]."""
  model = nnx.merge(graphdef, nnx.State(params))
  intervene(model, intervention)
  logits, _ = model.logits_and_stats(tokens[:, :-1], router_bias)
  return loss.nats_of_rows(logits, tokens[:, 1:])


def _mean_res(graphdef, params, router_bias, tokens):
  """H_res averaged over each row's tokens, [b, L, n, n]."""
  model = nnx.merge(graphdef, nnx.State(params))
  res = model.stream_stats(tokens[:, :-1], router_bias).res
  res = res.reshape(-1, len(tokens), tokens.shape[1] - 1, *res.shape[-2:])
  return jnp.swapaxes(jnp.mean(res, axis=2), 0, 1)
