"""Pipelines against one device, and what their programs hold and send."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from slow import pipeline_grid as grid

from mhc import config
from mhc.config import dicts
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.parallel import sharded
from mhc.parallel.placement import Placement
from mhc.pipeline import buffers
from mhc.pipeline import table as table_lib
from mhc.pipeline import ticks
from mhc.planner import hlo
from mhc.planner import targets
from mhc.training import step
from mhc.training.state import TrainState

pytestmark = [
  pytest.mark.long,
  pytest.mark.usefixtures('optax_promotion'),
]

# The rest of the grid is `python tests/slow/pipeline_grid.py`.
EXPERTS = grid.Case(
  'x0',
  True,
  (2, 2, 2),
  'interleaved',
  'vocab',
  'all_gather',
  num_sub_batches=2,
  keep='stages',
  body='values',
)
DENSE = grid.Case('mhc', False, (4, 2, 1), 'dualpipev', 'vocab', body='gqa')
CASES = (
  DENSE,
  grid.Case('mhc_single_pass', False, (1, 4, 1), 'wave_v', 'vocab'),
  # Of few streams, for the sake of the compiler: below are those of mHC.
  EXPERTS,
  # HC takes the way of mHC; that of a single pass is another.
  pytest.param(DENSE._replace(kind='hc'), marks=pytest.mark.slow),
  pytest.param(EXPERTS._replace(kind='mhc'), marks=pytest.mark.slow),
)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_gradients_are_those_of_one_device(case):
  error, where = grid.worst(
    grid.gradient(grid.config(case)), grid.reference(case)
  )
  assert error < 3e-5, where


@pytest.mark.slow
def test_kept_stages_have_the_gradients_of_stages_computed_again():
  """To the last bit, with NaN in every empty slot and two blocks at a time."""
  case = grid.Case('mhc', False, (1, 2, 1), 'interleaved', 'vocab')
  changes = {'model.num_blocks': 8, 'model.recompute_every': 4}
  again, kept = (
    grid.gradient(
      dicts.override(grid.config(case._replace(keep=keep)), changes)
    )
    for keep in ('inputs', 'stages')
  )
  for a, b in zip(*map(jax.tree.leaves, (again, kept)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_is_kept_is_not_the_weights():
  """Slots of the schedule, each with the activations of a stage alone."""
  schedule = table_lib.build('interleaved', 2, 4, head='vocab')
  # F and B of a stage and microbatch lie between the first and the last.
  assert 1 <= schedule.num_kept_slots <= 2 * 4
  assert table_lib.build('gpipe', 2, 4, head='vocab').num_kept_slots == 4
  with pytest.raises(ValueError, match=r"mesh.keep='stages'.*'last'"):
    config.MeshConfig(pipe=2, keep='stages')


@pytest.mark.parametrize(
  ('mesh', 'dispatch'),
  [
    ((2, 2, 1), 'capacity'),
    pytest.param((2, 2, 2), 'dropless', marks=pytest.mark.slow),
  ],
)
def test_losses_and_mappings_are_those_of_one_device(mesh, dispatch):
  """With blocks before the stack, rows of padding and microbatches."""
  results = []
  case = grid.Case('mhc', True, mesh, 'interleaved', 'vocab')
  settings = dicts.override(
    grid.config(case),
    {'model.moe.dispatch': dispatch, 'model.moe.capacity_factor': 100.0},
  )
  for mesh in (config.MeshConfig(num_devices=1), settings.mesh):
    programs = step.build(dataclasses.replace(settings, mesh=mesh))
    rng = np.random.default_rng(1)
    params, bias = grid.generic(programs.placement, rng)
    state = programs.to_pipeline_order(
      TrainState(np.zeros((), np.int32), params, None, bias)
    )
    again = programs.to_pipeline_order(programs.to_depth_order(state))
    for a, b in zip(*map(jax.tree.leaves, (state, again)), strict=True):
      np.testing.assert_array_equal(a, b)
    rows = rng.integers(0, 256, (2 * grid.ROWS, grid.TIME + 1), np.int32)
    tokens = partition.put(rows, programs.mesh, partition.BATCH)
    two = partition.put(rows[:2, :-1], programs.mesh, partition.REPLICATED)
    profile = programs.probe(state, two)
    results.append(
      jax.device_get({'nats': programs.token_losses(state, tokens)} | profile)
    )
  number = 2 * settings.model.num_blocks
  assert results[1]['pre_mean'].shape == (number, 4)
  for name, one in results[0].items():
    np.testing.assert_allclose(
      results[1][name], one, rtol=2e-5, atol=1e-6, err_msg=name
    )


def compiled(name, number, pipe=2, kind='residual', devices=None):
  """The gradient of a small pipeline with that many microbatches."""
  settings = grid.config(grid.Case(kind, False, (1, pipe, 1), name))
  settings = dataclasses.replace(
    settings, data=dataclasses.replace(settings.data, batch_size=number)
  )
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data, devices)
  compiled = step.Step(Placement(settings, mesh))
  state = compiled.abstract_state
  lowered = jax.jit(sharded.loss_and_grads(compiled.placement)).lower(
    state.params, state.router_bias, compiled.abstract_tokens
  )
  return lowered.compile(step.compiler_options(compiled.placement))


@pytest.mark.slow
def test_memory_does_not_grow_with_microbatches():
  """But for the tokens themselves; the buffers are those of any streams."""
  few, many = (compiled('interleaved', number) for number in (8, 64))
  sizes = [c.memory_analysis().temp_size_in_bytes for c in (few, many)]
  assert sizes[1] - sizes[0] <= 56 * 4 * (grid.TIME + 1)


def test_one_permute_a_channel_and_none_in_a_branch():
  module = hlo.parse(compiled('dualpipev', 8, 4).as_text())
  branches = set()

  def collect(name):
    branches.add(name)
    for instruction in module.computations[name]:
      for called in re.findall(r'%([\w.-]+)', instruction.attributes):
        if called in module.computations and called not in branches:
          collect(called)

  permutes = []
  for name, body in module.computations.items():
    for instruction in body:
      if instruction.opcode.startswith('collective-permute'):
        permutes.append(name)
      if instruction.opcode == 'conditional':
        for branch in hlo.branches(instruction):
          collect(branch)
  assert len(permutes) == len(table_lib.build('dualpipev', 4, 8).channels) == 4
  assert branches
  assert not branches & set(permutes)


@pytest.mark.slow
def test_transfers_between_stages_are_overlapped_on_a_tpu():
  """A whole branch, F or B, is between the start and the end of each."""
  devices = targets.devices('v5p:2x2x1')
  program = compiled('interleaved', 16, 4, 'mhc', devices)
  module = hlo.parse(program.as_text())
  seen = 0
  for body in module.computations.values():
    for index, start in enumerate(body):
      if start.opcode != 'collective-permute-start':
        continue
      done = next(
        later
        for later, i in enumerate(body)
        if i.opcode == 'collective-permute-done' and start.name in i.operands
      )
      between = [i.opcode for i in body[index:done]]
      assert 'conditional' in between
      seen += 1
  assert seen == 2


def test_how_often_branches_are_taken():
  frequency = ticks.branch_frequencies(table_lib.build('1f1b', 4, 16))
  # 22 ticks; F from the first to the 18th, B from the 4th on.
  assert frequency['pipeline_f'] == 18 / 22
  assert frequency['pipeline_b'] == 19 / 22
  assert frequency['pipeline_b_last'] == 16 / 19
  assert frequency['pipeline_head'] == 0


def test_an_empty_slot_takes_nothing():
  buffer = np.arange(6.0).reshape(3, 2)
  new = np.full(2, 9.0)
  kept = buffers.write_slot(buffer, np.int32(-1), new)
  np.testing.assert_array_equal(kept, buffer)
  np.testing.assert_array_equal(
    buffers.read_slot(buffers.write_slot(buffer, 2, new), 2), new
  )


@pytest.mark.parametrize(
  ('mesh', 'data', 'message'),
  [
    (dict(pipe=4), {}, r'8 stages, more than the 5 blocks'),
    (
      dict(pipe=2, num_devices=2, schedule='dualpipev'),
      dict(microbatch_size=8),
      r"'dualpipev' needs at least 4 microbatches.*mesh.pipe=2.*got 2",
    ),
    (dict(pipe=2, num_devices=6), {}, r'batch_size=16.* 3 device'),
    (dict(pipe=3, num_devices=4), {}, r'num_devices=4.*mesh.pipe=3'),
    (dict(pipe=16), {}, r'num_devices=16.*8 cpu'),
    (
      dict(pipe=2, num_sub_batches=2),
      {},
      r'mesh.num_sub_batches=2.*1 row',
    ),
    (dict(pipe=3, head='vocab'), {}, r'vocab_size=320.*mesh.pipe=3'),
  ],
)
def test_meshes_that_do_not_fit(mesh, data, message):
  base = grid.config(grid.Case())

  def make():
    settings = dataclasses.replace(
      base,
      mesh=config.MeshConfig(**mesh),
      data=dataclasses.replace(base.data, **data),
    )
    Placement(settings, mesh_lib.make_mesh(settings.mesh, settings.data))

  with pytest.raises(ValueError, match=message):
    make()


def test_ragged_all_to_all_is_not_for_cpus():
  case = grid.Case('mhc', True, (1, 1, 2), transport='ragged_all_to_all')
  with pytest.raises(
    ValueError, match=r"'ragged_all_to_all'.*not for cpu.*'all_to_all'"
  ):
    step.build(grid.config(case))
