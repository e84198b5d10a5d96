"""Panels: designs, axes and contrasts, and one clear line on mistakes."""

import dataclasses
import json

import pytest

from mhc.config import comparison as comparison_lib
from mhc.config import dicts

N = 'model.connection.num_streams'
STATIC = {
  'model.connection.kind': 'mhc',
  'model.connection.pre': 'static',
}


def cells(panel):
  found = comparison_lib.Comparison(panels={'p': panel}).cells('p')
  return {cell.name.removeprefix('p/'): cell for cell in found}


def test_a_panel_is_a_product():
  found = cells(
    comparison_lib.Panel(
      kinds=('residual', 'mhc'), seeds=(0, 1), num_blocks=(2, 3)
    )
  )
  assert len(found) == 8
  run = found['mhc-b3-lr0.003-s1'].config
  assert (run.seed, run.model.num_blocks) == (1, 3)
  assert run.model.connection.kind == 'mhc'


def test_an_axis_of_the_connection_does_not_vary_the_plain_residual():
  found = cells(
    comparison_lib.Panel(
      kinds=('residual', 'mhc', 'residual_params'),
      seeds=(0, 1),
      axes={N: (1, 4), 'optimizer.weight_decay': (0.0, 0.1)},
    )
  )
  # Two decays, two seeds; two values of n for the two that it varies.
  assert len(found) == 4 * (1 + 2 + 2)
  plain = found['residual-b4-lr0.003-weight_decay=0-s0']
  assert plain.setting[-1] == ('optimizer.weight_decay', 0.0)
  wide = found['mhc-b4-lr0.003-num_streams=1-weight_decay=0-s0']
  assert wide.config.model.connection.num_streams == 1
  assert comparison_lib.stands_for(plain.setting, wide.setting)
  other = found['mhc-b4-lr0.003-num_streams=1-weight_decay=0.1-s0']
  assert not comparison_lib.stands_for(plain.setting, other.setting)


def test_designs_have_their_own_settings():
  panel = comparison_lib.Panel(
    kinds=('residual', 'mhc', 'still'),
    designs={'still': STATIC},
    settings={'optimizer.schedule': 'cosine', N: 2},
    contrasts=(('still', 'mhc'),),
    learning_rates=(),
    num_blocks=(),
  )
  found = cells(panel)
  assert [*found][:3] == ['residual-s0', 'mhc-s0', 'still-s0']
  connection = found['still-s0'].config.model.connection
  assert (connection.pre, connection.num_streams) == ('static', 2)
  assert found['mhc-s0'].config.model.connection.pre == 'dynamic'
  plain = found['residual-s0'].config
  assert plain.optimizer.schedule == 'cosine'
  assert plain.model.connection.num_streams == 4  # has no meaning there
  assert panel.declared == (('still', 'mhc'),)


def test_rungs_are_an_axis():
  found = cells(
    comparison_lib.Panel(
      num_blocks=(), learning_rates=(), axes={'ladder': ('1m', '3m')}
    )
  )
  small, large = (found[f'mhc-ladder={r}-s0'].config for r in ('1m', '3m'))
  assert (small.model.dim, large.model.dim) == (96, 160)
  assert small.optimizer.learning_rate == 0.6 / 96


def test_contrasts_are_declared_by_default_and_only_to_report():
  panel = comparison_lib.Panel(kinds=('mhc', 'residual', 'hc'))
  assert panel.declared == (('mhc', 'residual'), ('mhc', 'hc'))
  matched = dataclasses.replace(panel, kinds=(*panel.kinds, 'residual_params'))
  assert matched.declared[-1] == ('mhc', 'residual_params')
  explored = dataclasses.replace(panel, role='explore', seeds=(0,))
  assert explored.declared == ()
  assert ('hc', 'residual') in explored.described


def test_json_round_trip():
  panel = comparison_lib.Panel(
    kinds=('residual', 'still'),
    designs={'still': STATIC},
    axes={N: (1, 2)},
    contrasts=(('still', 'residual'),),
    expected_sd=((('still', 'residual'), 0.01),),
  )
  comparison = comparison_lib.Comparison(panels={'p': panel})
  text = json.dumps(dicts.to_dict(comparison))
  read = dicts.from_dict(comparison_lib.Comparison, json.loads(text))
  assert read == comparison
  assert dict(read.panels['p'].expected_sd)['still', 'residual'] == 0.01


def test_a_comparison_from_before_declares_nothing():
  old = {'panels': {'p': {'kinds': ['residual', 'mhc'], 'seeds': [0]}}}
  assert comparison_lib.read(old).panels['p'].declared == ()


TUNE = comparison_lib.Panel(
  kinds=('residual', 'mhc'), seeds=(100, 101), role='tune'
)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(seeds=(0, 0)), 'none twice'),
    (dict(kinds=('mch',)), r"'mch'.*'mhc'"),
    (dict(seeds=(7,)), r"seeds=\(7,\).*two seeds.*role='explore'"),
    (
      dict(contrasts=(('mhc', 'identity'),)),
      "names 'identity', which the panel does not train",
    ),
    (dict(contrasts=(('mhc', 'mhc'),)), 'two designs'),
    (dict(contrasts=('mhc',)), "'mhc' must be two designs"),
    (
      dict(axes={'model.num_blokcs': (1,)}),
      "'model.num_blokcs'; did you mean 'model.num_blocks'",
    ),
    (dict(axes={'model': (1,)}), 'model=1: model is a group of settings'),
    (dict(axes={N: 4}), 'num_streams=4 must be a tuple'),
    (dict(axes={N: ('four',)}), "num_streams='four' must be of type int"),
    (dict(axes={'ladder': ('2m',)}), "'2m' must be one of"),
    (dict(axes=3), 'must be a dict or a tuple'),
    (
      dict(kinds=('mhc', 'mine'), designs={'mine': {N: 2}}),
      "'mine' must set model.connection.kind",
    ),
    (dict(margin=0.0), 'margin=0.0 must be positive'),
    (
      dict(tuned_on='rates'),
      "tuned_on='rates' is no other panel with role='tune'",
    ),
    (dict(tuned_on='tune', seeds=(99, 100)), r'share \[100\]'),
    (
      dict(tuned_on='tune', kinds=('hc', 'mhc')),
      "'tune' tunes no rate for 'hc'",
    ),
  ],
)
def test_mistakes_are_named(changes, message):
  values = {'kinds': ('residual', 'mhc'), 'seeds': (0, 1), **changes}
  with pytest.raises(ValueError, match=message):
    comparison_lib.Comparison(
      panels={'tune': TUNE, 'p': comparison_lib.Panel(**values)}
    )


def test_panels_are_chosen_by_name():
  comparison = comparison_lib.Comparison(panels={'tune': TUNE})
  comparison.check_panels(None)
  comparison.check_panels(['tune'])
  with pytest.raises(ValueError, match="'tunes' must be one of"):
    comparison.check_panels(['tunes'])


@pytest.mark.parametrize(
  'name', ['../../x', 'a/b', '', '.x', 'a b', 'a\nb', 'x' * 201, '[a]', '-x']
)
def test_names_of_folders_are_names(name):
  with pytest.raises(ValueError, match='becomes the name of a folder'):
    comparison_lib.Comparison(panels={name: comparison_lib.Panel()})
  own = ((name, (('model.connection.kind', 'mhc'),)),)
  panel = comparison_lib.Panel(
    kinds=('residual', name), designs=own, role='explore'
  )
  with pytest.raises(ValueError, match='becomes the name of a folder'):
    comparison_lib.Comparison(panels={'p': panel})


def test_folders_of_the_comparison_are_no_panels():
  for name in ('timing', 'leases', 'figures'):
    with pytest.raises(ValueError, match='is a folder of the comparison'):
      comparison_lib.Comparison(panels={name: comparison_lib.Panel()})


def test_rates_that_differ_in_the_seventh_digit_are_two_runs():
  rates = 0.001, 0.0010000001
  panel = comparison_lib.Panel(
    learning_rates=rates, kinds=('residual',), seeds=(0,), role='explore'
  )
  names = [
    cell.name
    for cell in comparison_lib.Comparison(panels={'p': panel}).cells('p')
  ]
  assert names == [
    'p/residual-b4-lr0.001-s0',
    'p/residual-b4-lr0.0010000001-s0',
  ]
