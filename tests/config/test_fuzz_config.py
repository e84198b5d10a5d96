"""Random settings (`fuzz_config`), and what they have found."""

import re
import typing

import hypothesis
import jax
import pytest
import settings_strategies as strategies
from slow import fuzz_config as fuzz
from slow import runner as runner_lib

from mhc import config
from mhc.config import dicts
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.pipeline import stage_layout

# ml_collections loads a config file by what Python will do without.
pytestmark = pytest.mark.filterwarnings(
  'ignore:.*load_module:DeprecationWarning'
)


EXAMPLES = hypothesis.settings(
  max_examples=50, derandomize=True, database=None, deadline=None
)


def test_settings_are_accepted_or_refused_in_one_line():
  """The rest is `python tests/slow/fuzz_config.py`, which runs them too."""
  runner, outcomes = runner_lib.Runner('check'), set()

  @EXAMPLES
  @hypothesis.given(strategies.cases())
  def check(case):
    outcome, message = fuzz.check(case, runner)
    assert outcome != 'failed', message
    outcomes.add(outcome)

  check()
  assert outcomes == {'built', 'refused'}


BODIES = {
  'default': {},
  'apart': strategies.TINY | strategies.APART,
  'all axes': strategies.TINY
  | strategies.EXPERTS
  | strategies.PIPE
  | strategies.SPLIT,
  'gqa': {'model.attention.kind': 'gqa', 'model.attention.rope_dim': 0},
  'yarn': {
    'model.attention.rope_scaling.kind': 'yarn',
    'model.attention.rope_scaling.original_length': 64,
  },
}


@pytest.mark.parametrize('base', BODIES.values(), ids=BODIES)
def test_a_choice_that_is_refused_alone_is_named(base):
  """Whatever else is then wrong, it is what was changed that people know."""
  usual, refused = dicts.leaves(config.Config()) | base, {}
  for name, hint in strategies.hints().items():
    hint = getattr(hint, '__value__', hint)
    for value in (True, False) if hint is bool else typing.get_args(hint):
      changed = runner_lib.nested(usual | {name: value})
      try:
        dicts.from_dict(config.Config, changed)
      except ValueError as error:
        refused[name, value] = str(error)
  assert len(refused) > 10
  for (name, value), message in refused.items():
    assert name.rpartition('.')[2] in message, (name, value, message)


@EXAMPLES
@hypothesis.given(strategies.comparisons())
def test_comparisons_are_made_or_refused_in_one_line(changes):
  outcome, message = fuzz.check_comparison(changes)
  assert outcome != 'failed', message


def test_what_fails_is_shrunk(capsys):
  def check(case):
    bad = any(name.startswith('guards.') for name in case.changes)
    return 'failed' if bad else 'ran', 'no guards'

  search = fuzz.Search(seed=0, verbose=False)
  search('config', strategies.cases(), check, 50)
  assert search.counts['config failed'] == 1
  case = strategies.Case(strategies.TINY, {'guards.nonfinite': 'log'})
  assert f'FAILED config {case}: no guards' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures('optax_promotion')
def test_a_case_runs():
  changes = {'model.num_blocks': 1, 'model.dim': 1, 'model.norm_eps': 0.0}
  case = strategies.Case(strategies.TINY, changes)
  outcome = fuzz.check(case, runner_lib.Runner())
  assert outcome == ('ran', '')


def test_an_unclear_refusal_is_a_failure():
  changes = {'data.seq_len': 7, 'seed': 3}
  assert not fuzz.unclear('data.seq_len=7 is too short', changes)
  assert not fuzz.unclear('seed=3 is not liked', changes)
  assert fuzz.unclear('data.seq_len=8 is too short', changes)
  assert fuzz.unclear('Maximum allowed dimension exceeded', changes)
  assert fuzz.unclear('data.seq_len=7\nis too short', changes)


def made(**changes):
  return dicts.from_dict(
    config.Config, runner_lib.nested(strategies.TINY | changes)
  )


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('seed', False, 'seed=False must be of type int'),
    ('seed', 2**31, 'seed=2147483648 must be an integer of 32 bits'),
    ('num_steps', 10**20, 'num_steps=1.*0 must be an integer of 32 bits'),
    ('optimizer.learning_rate', 1e39, r'rate=1e\+39 must be finite in float32'),
    ('optimizer.learning_rate', 10**400, 'rate=10*0 must be finite in float32'),
    ('optimizer.eps', 1e-46, 'eps=1e-46 is 0 in float32'),
    ('optimizer.b1', 1 - 1e-12, r'b1=0.9* must be in \[0, 1 - 2\*\*-24\]'),
    ('optimizer.decay_factors', (0.5, -0.1), r'-0.1\) must not be negative'),
    ('model.attention.rope_theta', 0.5, 'rope_theta=0.5 must be at least 1'),
    ('DATA.seq_len', 8, "'DATA'; did you mean 'data'"),
  ],
)
def test_what_devices_cannot_hold_is_refused(name, value, message):
  with pytest.raises(ValueError, match=message):
    made(**{name: value})


@pytest.mark.parametrize(
  'changes',
  [
    {'model.num_blocks': 10**9},
    {'model.dim': 2**31 - 1},
    {'model.attention.num_heads': 10**9},
    {'model.connection.num_streams': 10**6},
    {'data.batch_size': 10**9},
    {'model.moe.num_experts': 10**9},
    {'model.moe.num_experts': 4, 'model.moe.expert_dim': 10**9},
    {'model.vocab_size': 10**9, 'mesh.num_devices': 8, 'mesh.pipe': 2},
    {'model.ffn_dim': 10**9, 'optimizer.name': 'muon'},
  ],
)
def test_what_cannot_fit_is_refused_before_any_work(changes):
  settings = made(**changes)
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data)
  with pytest.raises(ValueError, match='GiB per device') as refusal:
    memory.check(settings, mesh)
  sizes = {k: v for k, v in changes.items() if isinstance(v, int)}
  name = max(sizes, key=sizes.get)
  assert f'Reduce {name}={sizes[name]}, ' in str(refusal.value)


def test_what_fits_or_nobody_knows_passes(monkeypatch):
  settings = made()
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data)
  memory.check(settings, mesh)
  large = made(**{'model.num_blocks': 10**9})
  monkeypatch.setattr(jax, 'local_devices', lambda: [])
  memory.check(large, mesh)


def test_a_pipeline_of_more_microbatches_than_its_table_holds():
  settings = made(**strategies.PIPE, **{'data.batch_size': 10**9})
  message = 'batch_size=1000000000.*microbatch_size=4 .* are 250000000 micro'
  with pytest.raises(ValueError, match=message):
    mesh_lib.make_mesh(settings.mesh, settings.data)


def test_more_stages_than_there_is_memory_for():
  message = 'mesh.pipe=2 pipeline devices with 1000000000 stage.*num_blocks=2'
  with pytest.raises(ValueError, match=message):
    stage_layout.StageLayout(2, 0, 2, 10**9, 'loop')


@pytest.mark.parametrize(
  'changes', [{'mesh.num_devices': 0}, {'mesh.schedule': 'wave_v'}]
)
def test_a_refusal_names_what_was_asked_for(changes):
  """Not what follows from it: 8 devices, two stages each."""
  case = strategies.Case(strategies.TINY | strategies.PIPE, changes)
  outcome, message = fuzz.check(case, runner_lib.Runner('check'))
  assert outcome == 'refused', message


def test_a_flag_may_write_a_number_otherwise():
  message = 'optimizer.eps=1000.0 is not liked'
  assert not fuzz.unclear(message, {'optimizer.eps': '1e3'})


def test_flags_and_dicts_agree():
  changes = strategies.TINY | {'optimizer.decay_points': (0.1, 0.2), 'seed': 3}
  assert fuzz.from_flags(changes) == made(**changes)
  shown = fuzz.shown(strategies.Case(strategies.TINY, {'optimizer.b1': 0.5}))
  assert re.search(r'--config.optimizer.b1=0.5', shown)
