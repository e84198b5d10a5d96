"""What a comparison has to do: controls, tuned rates, the plan."""

import dataclasses
import json
import math

from example_configs import TINY_RUN
import pytest

from mhc import config
from mhc.config import comparison as comparison_lib
from mhc.config import presets
from mhc.experiments import controls
from mhc.experiments import jobs as jobs_lib
from mhc.experiments import plan
from mhc.experiments import statistics
from mhc.experiments import timing
from mhc.parallel import counts

RUNGS = ('1m', '3m', '10m', '30m', '100m')


@pytest.mark.parametrize('rung', RUNGS)
def test_as_many_parameters_on_every_rung(rung):
  wide = presets.ladder(rung)
  plain = dataclasses.replace(wide, model=wide.model.plain)
  matched = controls.match('residual_params', plain, wide, None)
  wanted = controls.num_params(wide.model)
  assert controls.num_params(plain.model) < 0.99 * wanted or rung == '100m'
  assert abs(controls.num_params(matched.model) / wanted - 1) < 0.001
  assert matched.model.connection.kind == 'residual'


def test_controls_of_a_dense_model():
  wide = config.Config(data=config.DataConfig(batch_size=32))
  plain = dataclasses.replace(wide, model=wide.model.plain)
  matched = controls.match('residual_params', plain, wide, None)
  wanted = controls.num_params(wide.model)
  assert abs(controls.num_params(matched.model) / wanted - 1) < 0.01
  memory = controls.match('residual_memory', plain, wide, None)
  assert memory.model.dim > plain.model.dim
  assert memory.model.ffn_dim == 2 * memory.model.dim
  assert controls._bytes(memory) >= controls._bytes(wide)
  time = controls.match('residual_time', plain, wide, 1.5)
  assert time.num_steps == 600
  twice = controls.match('residual_replicate', plain, wide, None)
  assert twice.data.microbatch_size == 16
  again = dataclasses.replace(plain, data=twice.data)
  assert controls._other_rows(again) == 8


TUNE = comparison_lib.Panel(
  kinds=('residual', 'mhc'),
  seeds=(100,),
  num_blocks=(1,),
  learning_rates=(1e-3, 2e-3, 4e-3),
  num_steps=12,
  batch_size=4,
  role='tune',
)
MAIN = comparison_lib.Panel(
  kinds=('residual', 'residual_params', 'residual_time', 'mhc'),
  num_blocks=(1,),
  learning_rates=(),
  tuned_on='tune',
  num_steps=12,
  batch_size=4,
  expected_sd=((('mhc', 'residual'), 0.01),),
)


@pytest.fixture
def comparison():
  base = dataclasses.replace(TINY_RUN, mesh=config.MeshConfig(num_devices=1))
  return comparison_lib.Comparison(base, {'main': MAIN, 'tune': TUNE})


def finish(workdir, name, loss):
  folder = workdir / name
  folder.mkdir(parents=True)
  (folder / 'summary.json').write_text(json.dumps({'heldout_nats': loss}))


def test_jobs_appear_as_what_they_need_is_found(comparison, tmp_path):
  jobs = jobs_lib.Jobs(comparison, tmp_path, ['main'])
  assert jobs.panels == ('tune', 'main')
  names = jobs.names()
  assert len(names) == 6
  assert not jobs.is_complete()
  for name in names:
    rate = jobs.cell(name).config.optimizer.learning_rate
    # The residual is best at 2e-3, mHC at the edge.
    best = 2e-3 if 'residual' in name else 4e-3
    finish(tmp_path, name, 2 + abs(math.log(rate / best)))
  assert all(map(jobs.is_done, names))
  names = jobs.names()
  assert names[0] == 'timing/main'
  assert len(names) == 1 + 6 + 4 * 3  # residual_time is not matched yet
  rates = {
    cell.design: cell.config.optimizer.learning_rate
    for cell in jobs.cells('main')
  }
  assert rates == {'residual': 2e-3, 'residual_params': 2e-3, 'mhc': 4e-3}
  chosen = jobs.rates('main')
  assert (chosen['residual'].at_edge, chosen['mhc'].at_edge) == (False, True)
  file = timing.path(tmp_path, 'main')
  file.parent.mkdir()
  file.write_text(json.dumps({'mhc': {'ratio': [2.0, 1.9, 2.1]}}))
  assert jobs.is_complete()
  steps = {c.design: c.config.num_steps for c in jobs.cells('main')}
  assert steps == dict(
    residual=12, residual_params=12, residual_time=24, mhc=12
  )
  assert jobs_lib.program(jobs.cell(names[1]).config).seed == 0


def test_tokens_are_counted_by_the_residuals_parameters(comparison, tmp_path):
  panel = dataclasses.replace(TUNE, tokens_per_param=2.0)
  jobs = jobs_lib.Jobs(
    dataclasses.replace(comparison, panels={'tune': panel}), tmp_path
  )
  steps = {cell.config.num_steps for cell in jobs.cells()}
  plain = jobs.cells()[0].config
  active = counts.count(plain.model, plain.data.seq_len)['active_params']
  assert steps == {math.ceil(2 * active / 64)}


def test_the_plan(comparison, tmp_path):
  jobs = jobs_lib.Jobs(comparison, tmp_path)
  speed = plan.Speed(model=1e-9, streams=2e-9, compile_s=10.0)
  lines = plan.predict(jobs, speed)
  assert [(line.panel, line.runs, line.programs) for line in lines] == [
    ('tune', 6, 6),
    ('main', 16, 2),  # before rates and controls are known
  ]
  # Runs that have finished cost nothing.
  finish(tmp_path, jobs.names()[0], 2.0)
  fewer = plan.predict(jobs, speed)
  assert (fewer[0].done, fewer[0].programs) == (1, 5)
  assert 10 < lines[0].seconds - fewer[0].seconds < 20
  cells = {cell.design: cell.config for cell in jobs.cells()}
  plain, wide = (
    plan.run_seconds(cells[kind], speed) for kind in ('residual', 'mhc')
  )
  assert wide > plain > plan.RUN_S
  ((panel, pair, seeds, sd, seen),) = plan.resolution(jobs)
  assert (panel, pair, seeds, sd) == ('main', 'mhc - residual', 4, 0.01)
  # Two contrasts of mHC with matched residuals are declared as well.
  assert seen == statistics.mde(0.01, 4, 3)
  text = plan.describe(jobs, lines, 2)
  assert 'on 2 workers' in text
  assert f'differences of {seen:.4f}' in text
