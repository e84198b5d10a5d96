"""What a command line gives to a comparison is used, or refused."""

import pytest

from mhc.config import comparison as comparison_lib
from mhc.config import given

Panel = comparison_lib.Panel


def comparison(**panels):
  return comparison_lib.Comparison(panels=panels)


TWO = comparison(
  quality=Panel(settings={'probe_every': 5}),
  depth=Panel(num_blocks=(), settings={'optimizer.schedule': 'cosine'}),
)


@pytest.mark.parametrize(
  ('argument', 'instead'),
  [
    ('--config.base.num_steps=50', 'panels.quality.num_steps'),
    ('-config.base.data.batch_size=50', 'panels.quality.batch_size'),
    ('--config.base.optimizer.learning_rate=1', 'quality.learning_rates'),
    ('--config.base.model.connection.kind=hc', 'panels.quality.kinds'),
    ('--config.base.seed=3', 'panels.quality.seeds'),
  ],
)
def test_what_every_panel_sets_is_refused(argument, instead):
  with pytest.raises(ValueError, match=f'would not be used.*{instead}'):
    given.check(TWO, ['compare.py', argument])
  with pytest.raises(ValueError, match='would not be used'):
    given.check(TWO, ['compare.py', *argument.split('=')])


def test_what_some_panels_set_is_told():
  lines = given.check(
    TWO, ['--config.base.model.num_blocks=2', '--config.base.probe_every=3']
  )
  assert ['quality' in line and 'depth' not in line for line in lines] == [
    True,
    True,
  ]
  assert 'panels.quality.num_blocks' in lines[0]
  assert 'panels.quality.settings' in lines[1]
  # Of the panels that are trained.
  with pytest.raises(ValueError, match='would not be used'):
    given.check(TWO, ['--config.base.probe_every=3'], ['quality'])
  assert not given.check(TWO, ['--config.base.probe_every=3'], ['depth'])


def test_what_is_used_passes():
  for argument in (
    '--config.base.eval_sequences=8',
    '--config.base.model.connection.num_streams=2',
    '--config.panels.quality.num_steps=3',
    '--config.panels.quality.seeds=(0, 1)',
    '--config.panels.quality.seeds=(3,)',
    '--workdir=x',
  ):
    assert given.check(TWO, [argument]) == []


def test_a_rung_replaces_the_model_but_its_connection():
  rungs = comparison(rung=Panel(num_blocks=(), axes={'ladder': ('1m',)}))
  with pytest.raises(ValueError, match='dim=8 would not be used'):
    given.check(rungs, ['--config.base.model.dim=8'])
  assert not given.check(
    rungs, ['--config.base.model.connection.sinkhorn_iters=3']
  )


def test_seeds_are_listed():
  with pytest.raises(ValueError, match=r'seed 3 alone.*\(0, 1, 2\).*\(3,\)'):
    given.check(TWO, ['--config.panels.quality.seeds=3'])
  with pytest.raises(ValueError, match='seed 0 alone'):
    given.check(TWO, ['--config.panels.depth.seeds', '0'])
