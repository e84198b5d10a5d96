"""Steps compiled for machines that are not here, and their HLO read."""

import dataclasses
import functools

import jax
import pytest

from mhc import config
from mhc.config import dicts, presets
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.planner import draw
from mhc.planner import hlo
from mhc.planner import kernel_bundles
from mhc.planner import plan
from mhc.planner import search
from mhc.planner import table as plan_table
from mhc.planner import targets
from mhc.training import step
from mhc.training import xla_options

pytestmark = pytest.mark.usefixtures('optax_promotion')

TINY = config.Config(
  num_steps=40,
  model=config.ModelConfig(
    num_blocks=4,
    dim=128,
    ffn_dim=128,
    dtype='bfloat16',
    recompute='none',
    attention=config.AttentionConfig(
      num_heads=1, head_dim=64, rope_dim=64, kv_rank=64
    ),
    connection=config.ConnectionConfig(kind='residual'),
  ),
  data=config.DataConfig(seq_len=128, batch_size=4),
)


@pytest.fixture(scope='module')
def bundles():
  """The kernels' bundles: once, they are the same for any number of blocks."""
  return functools.cache(functools.partial(kernel_bundles.of_step, TINY))


@pytest.fixture(scope='module')
def sliced(bundles):
  with (
    jax.numpy_dtype_promotion('standard'),  # for optax
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setattr(kernel_bundles, 'of_step', lambda _, where: bundles(where))
    return plan.plan_step(TINY, 'v5e:2x2')


def test_a_tpu_slice(sliced):
  assert sliced['devices'] == 4
  assert sliced['mesh'] == {'data': 4, 'pipe': 1, 'expert': 1}
  assert sliced['total_params'] > 0
  # Parameters and both moments; matrices are split over the devices.
  kept = sliced['by_category']
  assert 1 <= kept['parameters'] / sliced['total_params'] < 1.1
  assert kept['optimiser'] == pytest.approx(2 * kept['parameters'], rel=1e-3)
  assert sum(kept.values()) == sliced['bytes_per_device']
  assert sliced['fits']
  assert sliced['bytes_per_device'] < sliced['hbm_bytes'] == 16 << 30
  assert sliced['bubble'] == 0
  assert 1e-5 < sliced['compute_seconds'] < sliced['step_seconds'] < 1
  assert sliced['bytes_moved'] > 12 * sliced['total_params'] / 4
  assert 0 < sliced['exposed_comm_fraction'] < 1
  # Matrices are put together block by block, forward and backward.
  gathers = sliced['collectives']['data']['all-gather']
  assert gathers['count'] >= 8
  assert gathers['exposed'] <= gathers['seconds']
  assert sliced['mfu'] == pytest.approx(
    sliced['tokens_per_second'] * sliced['flops_per_token'] / (4 * 197e12)
  )
  text = plan_table.table(sliced)
  assert 'v5e:2x2' in text
  assert f'{sliced["total_params"]:,}' in text
  assert 'all-gather over data' in text


def test_where_the_step_goes(sliced):
  """Its parts add up to it, and all but a little has a name."""
  parts = {k: v['seconds'] for k, v in sliced['breakdown'].items()}
  seconds = sliced['step_seconds']
  assert sum(parts.values()) == pytest.approx(seconds, rel=0.01)
  assert parts['other'] < 0.1 * seconds
  assert parts['unknown'] < 0.01 * seconds
  for name in ('attention', 'dense_products', 'head', 'optimiser'):
    assert parts[name] > 0
  low, high = sliced['step_seconds_bounds']
  assert low < seconds < high
  assert sliced['mfu_compiler'] < sliced['mfu']
  text = plan_table.table(sliced)
  assert 'seconds: dense products' in text
  assert '| connections, over all else |' in text


def test_a_drawn_step(sliced, tmp_path):
  draw.save(sliced, str(tmp_path / 'new' / 'step.png'))
  assert (tmp_path / 'new' / 'step.png').stat().st_size > 10_000
  with pytest.raises(ValueError, match="'cpu' that fits has no time"):
    draw.save(sliced | {'topology': 'cpu', 'breakdown': None}, 'x.png')


def test_loops_count_in_full(sliced, bundles, monkeypatch):
  """Twice the blocks in the same loops: XLA's total stays, ours grows."""
  monkeypatch.setattr(
    kernel_bundles, 'of_step', lambda _, where: bundles(where)
  )
  deeper = plan.plan_step(
    dataclasses.replace(
      TINY, model=dataclasses.replace(TINY.model, num_blocks=8)
    ),
    'v5e:2x2',
  )
  assert deeper['bytes_moved'] > 1.3 * sliced['bytes_moved']
  assert deeper['compute_seconds'] > 1.2 * sliced['compute_seconds']


def test_the_cpu_is_a_topology():
  result = plan.plan_step(TINY, 'cpu')
  assert result['step_seconds'] is None
  assert result['bytes_per_device'] > 0
  assert 'seconds a step' not in plan_table.table(result)


def test_what_does_not_fit_says_by_how_much():
  """Rows whose activations alone take more than a device has."""
  wide = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, ffn_dim=2**15),
    data=dataclasses.replace(TINY.data, batch_size=64, seq_len=2048),
  )
  result = plan.plan_step(wide, 'v5e:2x2')
  assert not result['fits']
  assert result['bytes_per_device'] > result['hbm_bytes']
  assert 'too much' in plan_table.table(result)


def test_suggestions_fit_and_are_sorted():
  config = presets.paper('3b')
  found = search.suggest(config, 'v5p:2x2x2', 8)
  assert [one.seconds for one in found] == sorted(one.seconds for one in found)
  assert all(one.bytes < 95 << 30 for one in found)
  table = search.table(found, config, 8, 95 << 30)
  assert 'mesh.pipe=' in table
  days = config.num_steps * found[0].seconds / 86400
  assert f'{days:.3g} days, {days * 24 * 8:,.0f} device-hours' in table
  # What is suggested can be asked for.
  settings = dict(found[0].settings)
  assert 8 % (settings['mesh.pipe'] * settings['mesh.expert']) == 0
  with pytest.raises(ValueError, match=r'nothing fits 4 devices.*of 16'):
    search.suggest(presets.paper('27b'), 'v5e:2x2', 4)
  with pytest.raises(ValueError, match=r"'cpu'.*v5p"):
    search.suggest(TINY, 'cpu', 8)


def test_the_compiler_is_told_what_hides_transfers():
  """But not where somebody does not want it, or there is nothing to send."""
  mesh = mesh_lib.make_mesh(TINY.mesh, TINY.data, targets.devices('v5p:2x2x1'))
  told = step.compiler_options(Placement(TINY, mesh))
  assert told == xla_options.options('v5p', ahead=True)
  assert set(xla_options.AHEAD) < set(told)
  assert not set(xla_options.AHEAD) & set(
    xla_options.options('v5p', ahead=False)
  )
  experts = dicts.override(TINY, {'mesh.expert': 2, 'model.moe.num_experts': 4})
  for way, options in (
    ('all_gather', xla_options.options('v5p', ahead=False)),
    ('all_to_all', told),
  ):
    by_experts = dicts.override(experts, {'model.moe.transport': way})
    assert step.compiler_options(Placement(by_experts, mesh)) == options
  without = dataclasses.replace(TINY, mesh=config.MeshConfig(overlap=False))
  assert step.compiler_options(Placement(without, mesh)) == {}
  one = mesh_lib.make_mesh(
    config.MeshConfig(num_devices=1), TINY.data, targets.devices('v5p:2x2x1')
  )
  assert step.compiler_options(Placement(TINY, one)) == {}


@pytest.mark.slow
def test_attention_is_computed_once_a_block():
  """Also where a loop gathers tokens, for their experts, beside matrices."""
  changes = {
    'mesh.expert': 2,
    'model.num_blocks': 5,
    'model.recompute': 'mhc',
    'model.recompute_every': 2,
    'model.moe.num_experts': 4,
    'model.moe.expert_dim': 128,
    'model.moe.transport': 'all_gather',
    'model.moe.num_dense_blocks': 1,
  }
  settings = dicts.override(TINY, changes)
  devices = targets.devices('v5p:2x2x1')
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data, devices)
  whole = step.Step(Placement(settings, mesh))
  options = step.compiler_options(whole.placement)
  module = hlo.parse(whole.trace().lower().compile(options).as_text())
  for kernel in ('attention_forward', 'attention_backward'):
    assert executions(module, module.entry, kernel) == 5


def executions(module, computation, name):
  """How often an instruction of that name runs, but in conditionals."""
  number = 0
  for instruction in module.computations[computation]:
    if instruction.opcode == 'custom-call':
      number += instruction.name.startswith(name)
    elif instruction.opcode == 'while':
      body = hlo.called(instruction, 'body')
      number += hlo.trips(module, instruction) * executions(module, body, name)
  return number


def test_impossible_topologies():
  with pytest.raises(ValueError, match=r"'v5q:2x2'.*v5p:2x2x1"):
    plan.plan_step(TINY, 'v5q:2x2')
  with pytest.raises(ValueError, match=r'num_devices=8.*4 tpu'):
    plan.plan_step(
      dataclasses.replace(TINY, mesh=config.MeshConfig(num_devices=8)),
      'v5e:2x2',
    )
