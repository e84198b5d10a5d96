"""Compares gradients of every schedule, mesh and kind with one device.

    python tests/slow/pipeline_grid.py              float32, within 3e-5
    python tests/slow/pipeline_grid.py --x64        float64, within 1e-11

The one device computes in float64 either way, so that an error is the
pipeline's own and not the difference of two that round otherwise.

216 cases of a few seconds each, 45 minutes on two cores; one line per case,
exit status 1 if one fails. `--only=TEXT` runs the cases whose line contains it.
Buffers and idle devices are filled with NaN throughout.
tests/pipeline/test_executor.py runs some of the cases.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from typing import NamedTuple
from unittest import mock

if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=300'
  )

import jax
import jax.numpy as jnp
import numpy as np

from mhc import config as config_lib
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import sharded
from mhc.parallel.placement import Placement
from mhc.pipeline import buffers
from mhc.training import state as state_lib

ROWS, TIME = 16, 6
KINDS = ('residual', 'hc', 'mhc', 'mhc_single_pass', 'attn_res_block', 'x0')
# On two meshes alone; `expand` is the learned scale of the streams of mhc.
DESIGNS = ('frac', 'mhar', 'go', 'wide_residual', 'expand')
SCHEDULES = ('gpipe', '1f1b', 'interleaved', 'wave_v', 'dualpipev')
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (4, 2, 1))

SINKHORN_ITERS = 3  # few, for the sake of the compiler, which unrolls them

BODY = config_lib.AttentionConfig(
  kind='gqa',
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  rope_dim=0,
  qkv_bias=True,
  qk_norm=True,
  rope_scaling=config_lib.RopeScalingConfig('yarn', 4, original_length=4),
)

GROUPS = dict(
  num_groups=4, groups_per_token=2, normalize_gates=False, gate_scale=2.5
)


class Case(NamedTuple):
  """One gradient; the mesh is (data, pipe, expert)."""

  kind: str = 'mhc'
  experts: bool = False
  mesh: tuple[int, int, int] = (1, 1, 1)
  schedule: str = 'interleaved'
  head: str = 'last'
  transport: str = 'auto'
  num_sub_batches: int = 1
  keep: str = 'inputs'
  # 'gqa': BODY, and a tied head; 'values': latent, and a value residual.
  body: str = 'mla'


def cases():
  """Yields the grid; transports, heads and what is kept take turns."""
  turn = itertools.count()
  for experts, kind, mesh in itertools.product((False, True), KINDS, MESHES):
    if mesh[2] > 1 and not experts:
      continue
    for schedule in SCHEDULES if mesh[1] > 1 else ('interleaved',):
      number = next(turn)
      yield Case(
        kind,
        experts,
        mesh,
        schedule,
        head='vocab' if mesh[1] > 1 and number % 2 else 'last',
        transport=('all_to_all', 'all_gather')[number // 2 % 2],
        keep='stages' if mesh[1] > 1 and number % 4 == 1 else 'inputs',
      )
  for kind in DESIGNS:
    yield Case(kind, True, (2, 2, 2), 'interleaved', head='vocab')
    yield Case(kind, False, (4, 2, 1), '1f1b', head='vocab', keep='stages')
  for head in ('last', 'vocab'):
    yield Case('mhc', True, (2, 2, 2), 'interleaved', head=head, body='gqa')
    yield Case('hc', False, (4, 2, 1), 'dualpipev', head=head, body='gqa')
    yield Case('mhc', True, (2, 2, 2), 'wave_v', head=head, body='values')
    yield Case(
      *('residual', False, (4, 2, 1), '1f1b'),
      head=head,
      keep='stages' if head == 'vocab' else 'inputs',
      body='values',
    )


def config(
  case: Case, dtype: str = 'float32', recompute: str = 'mhc'
) -> config_lib.Config:
  """A config with one block more than the pipeline has stages, at least 5."""
  data, pipe, expert = case.mesh
  stages = pipe * (1 if case.schedule in ('gpipe', '1f1b') else 2)
  moe = config_lib.MoEConfig()
  if case.experts:
    moe = config_lib.MoEConfig(
      num_experts=8,
      expert_dim=8,
      num_dense_blocks=1,
      balance_loss=0.1,
      transport=case.transport,
      # So small that there are overflow rounds.
      buffer_factor=0.75,
      **(GROUPS if case.body == 'gqa' else {}),
    )
  model = config_lib.ModelConfig(
    num_blocks=max(5, stages + 1),
    dim=16,
    ffn_dim=16,
    recompute=recompute,
    tied_embeddings=case.body == 'gqa',
    attention=BODY
    if case.body == 'gqa'
    else config_lib.AttentionConfig(
      num_heads=1,
      head_dim=8,
      rope_dim=4,
      kv_rank=8,
      value_residual=case.body == 'values',
    ),
    connection=_connection(case.kind),
    moe=moe,
  )
  object.__setattr__(model, 'dtype', dtype)
  return config_lib.Config(
    model=model,
    data=config_lib.DataConfig(
      seq_len=TIME, batch_size=ROWS, microbatch_size=case.num_sub_batches
    ),
    mesh=config_lib.MeshConfig(
      num_devices=data * pipe * expert,
      pipe=pipe,
      expert=expert,
      schedule=case.schedule,
      head=case.head,
      keep=case.keep,
      num_sub_batches=case.num_sub_batches,
    ),
  )


def _connection(kind):
  options = dict(kind=kind)
  if kind == 'expand':
    options = dict(kind='mhc', expand_scale='learned')
  if options['kind'] in ('mhc', 'mhc_single_pass'):
    options |= dict(sinkhorn_iters=SINKHORN_ITERS)
  return config_lib.ConnectionConfig(**options)


def generic(p: Placement, rng: np.random.Generator) -> tuple:
  """Generic parameters and biases of the router, in depth order."""
  is_hc = p.config.model.connection.kind == 'hc'

  def fill(path, leaf):
    # Norms, gates, H_pre and H_post are around 1. HC's own mappings are near I,
    # and the part of them that depends on the streams is small, as HC starts,
    # or they would amplify rounding from block to block: in 17 blocks float32
    # on one device would be 4e-5 from float64.
    name, noise = path[-1].key, 0.2 * rng.normal(size=leaf.shape)
    if name == 'place':
      return _places([key.key for key in path], leaf, p.config.model)
    if name in ('theta_res', 'bias_res'):
      noise *= 0.1
    if name == 'bias_res':
      noise += np.eye(leaf.shape[-1])
    elif leaf.ndim < 3 and not name.startswith('theta'):
      noise += 1
    if is_hc and name == 'alpha':
      noise *= 0.1
    # The same numbers in float64 as in float32.
    return noise.astype(np.float32).astype(leaf.dtype)

  shapes = state_lib.abstract_saved(p)
  bias = shapes.router_bias
  if bias is not None:
    bias = np.zeros(bias.shape, bias.dtype)
  return jax.tree_util.tree_map_with_path(fill, shapes.params), bias


def _places(names, leaf, model):
  """The indices of the sub-layers of a stack, which are no parameters."""
  first = 0
  if names[0] == 'moe_blocks':
    first = model.num_blocks - model.num_moe_blocks
  numbers = 2 * (first + np.arange(len(leaf))) + (names[1][0] == 'f')
  return numbers.astype(leaf.dtype)[:, None]


def gradient(settings: config_lib.Config) -> dict:
  """Loss, gradient and loads at generic parameters, in depth order."""
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data)
  p = Placement(settings, mesh)
  rng = np.random.default_rng(0)
  params, bias = generic(p, rng)
  tokens = rng.integers(0, 256, (ROWS, TIME + 1), np.int32)

  @jax.jit
  def run(params, bias, tokens):
    state = state_lib.TrainState(0, params, (), bias)
    state = p.to_pipeline_order(state)
    loss, grads, load = sharded.loss_and_grads(p)(
      state.params, state.router_bias, tokens
    )
    grads = p.to_depth_order(state._replace(params=grads)).params
    load = jax.tree.map(p.layout.to_depth_order, load)
    return {'loss': loss, 'grads': grads, 'load': load}

  nan = functools.partial(_filled, value=jnp.nan)
  with jax.set_mesh(mesh), mock.patch.object(buffers, 'unused', nan):
    return jax.device_get(run(params, bias, tokens))


def _filled(shapes, *extra, value):
  """Arrays of `value`; whole numbers, which have no NaN, of -7."""

  def leaf(shape):
    inexact = jnp.issubdtype(shape.dtype, jnp.inexact)
    return buffers.filled(shape, value if inexact else -7, *extra)

  return jax.tree.map(leaf, shapes)


def worst(got: dict, want: dict) -> tuple[float, str]:
  """The largest error, relative to the largest value of its array; its path.

  At least relative to a thousandth of the largest of all: the first sub-layer's
  H_pre has no gradient but rounding, its streams being equal and normed.
  """
  errors = {}
  least = 1e-3 * max(
    np.abs(leaf).max() for leaf in jax.tree.leaves(want['grads'])
  )
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert np.isfinite(a).all(), jax.tree_util.keystr(path)
    scale = max(np.abs(b).max(), least)
    errors[jax.tree_util.keystr(path)] = float(np.abs(a - b).max() / scale)
  return max((error, path) for path, error in errors.items())


def reference(case: Case) -> dict:
  """The gradient on one device in float64, without recomputation."""
  settings = config(case, 'float64', recompute='none')
  with double_precision():
    return gradient(
      dataclasses.replace(
        settings,
        mesh=config_lib.MeshConfig(num_devices=1),
        data=dataclasses.replace(settings.data, microbatch_size=1),
      )
    )


@contextlib.contextmanager
def double_precision():
  """float64, also for the parts that are float32 whatever the activations."""
  with jax.enable_x64(True), mock.patch.object(jnp, 'float32', jnp.float64):
    yield


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--x64', action='store_true')
  parser.add_argument('--only', default='')
  arguments = parser.parse_args()
  dtype, bound = ('float64', 1e-11) if arguments.x64 else ('float32', 3e-5)
  known, failed, number, largest = {}, 0, 0, 0.0
  for case in cases():
    if arguments.only not in str(case):
      continue
    settings = config(case, dtype)
    key = (case.kind, case.experts, case.body, settings.model.num_blocks)
    if key not in known:
      known[key] = reference(case)
    with double_precision() if arguments.x64 else contextlib.nullcontext():
      got = gradient(settings)
    error, where = worst(got, known[key])
    number, largest = number + 1, max(largest, error)
    failed += error > bound
    mark = 'FAILED' if error > bound else 'ok'
    print(f'{mark} {error:.1e} {where} {case}', flush=True)
  print(f'{number - failed} of {number} within {bound}, largest {largest:.1e}')
  sys.exit(bool(failed))


if __name__ == '__main__':
  main()
