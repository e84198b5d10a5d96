"""Guards: what they see, when, and what a run does about it."""

import dataclasses
import json
import math

from example_configs import TINY_RUN
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.config import dicts
from mhc.data import batches
from mhc.data import mixture as mixture_lib
from mhc.parallel import partition
from mhc.runtime import json_lines
from mhc.training import guards
from mhc.training import loop
from mhc.training import run as run_lib
from mhc.training import step

pytestmark = pytest.mark.usefixtures('optax_promotion')


def of(kind='mhc', **policies):
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      connection=config_lib.ConnectionConfig(kind=kind)
    ),
    guards=config_lib.GuardsConfig(**policies),
  )
  return guards.Guards(config)


def told(guard, losses, norms=None):
  """The events of a run with these losses."""
  events = []
  for number, loss in enumerate(losses, 1):
    values = {'loss/train': loss, 'grad/global_norm': 1.0}
    if norms is not None:
      values['grad/global_norm'] = norms[number - 1]
    events += guard.step(number, guard.loss_limit(), values)
  return events


def test_a_spike_is_seen_once_and_a_falling_loss_is_none():
  losses = 5 * np.exp(-np.arange(200) / 100) + 0.05 * np.sin(np.arange(200))
  assert told(of(), losses.tolist()) == []
  losses[120:124] += 6
  (event,) = told(of(), losses.tolist())
  assert (event.step, event.guard, event.policy) == (121, 'loss_spike', 'log')
  assert event.value == losses[120] > event.bound > losses[119]


def test_the_limit_by_hand():
  guard = of(spike_score=10.0, spike_window=16)
  rng = np.random.default_rng(0)
  losses = rng.normal(3, 0.1, size=40).tolist()
  for number, loss in enumerate(losses, 1):
    limit = guard.loss_limit()
    if number < 19:
      # The window is full after step 16, for the step after next.
      assert limit == math.inf or number == 18
    else:
      window = np.array(losses[number - 18 : number - 2])
      middle = np.median(window)
      mad = np.median(np.abs(window - middle))
      assert limit == pytest.approx(middle + 10 * 1.4826 * mad)
    guard.step(number, limit, {'loss/train': loss, 'grad/global_norm': 1.0})


def test_what_is_not_finite():
  (event,) = told(of(), [3.0, math.nan, math.nan, 3.0])
  assert (event.step, event.metric, event.policy) == (2, 'loss', 'skip_step')
  norms = [1.0, math.inf, 1.0, math.nan]
  first, second = told(of(nonfinite='stop'), [3.0] * 4, norms)
  assert (first.step, first.metric, first.policy) == (
    2,
    'gradient norm',
    'stop',
  )
  assert second.step == 4


def test_too_many_skips_end_the_run():
  guard = of(max_skips=2)
  events = []
  for number in range(1, 4):
    values = {'loss/train': math.nan, 'grad/global_norm': 1.0}
    values['optimizer/skipped'] = 1.0
    events += guard.step(number, guard.loss_limit(), values)
  assert [(e.step, e.guard) for e in events] == [(1, 'nonfinite'), (3, 'skips')]
  assert guards.most_severe(events) == 'stop'


def profile(gain=1.0, cosine=0.5, growth=2.0, residual=0.0):
  found = {
    'composite_fwd': np.array([1.0, 1.0]),
    'composite_bwd': np.array([gain, 1.0]),
    'stream_cosine': np.array([1.0, cosine]),
    'stream_rms': np.array([1.0, growth]),
    'row_residual': np.array([0.0, 0.0]),
    'column_residual': np.array([0.0, residual]),
  }
  return guards.measures(found)


def test_what_a_probe_tells():
  guard = of(gain='stop', streams='rollback', sinkhorn='log')
  # Copies at the start are not a collapse.
  assert guard.probe(5, profile(cosine=1.0)) == []
  assert guard.probe(10, profile()) == []
  (event,) = guard.probe(15, profile(cosine=0.9999))
  assert (event.guard, event.policy) == ('streams', 'rollback')
  assert guard.probe(20, profile(cosine=0.9999)) == []
  assert guard.probe(25, profile()) == []
  wrong = profile(gain=11.0, growth=2e3, residual=2.0, cosine=0.9999)
  events = guard.probe(30, wrong)
  assert {e.guard for e in events} == {'gain', 'streams', 'sinkhorn'}
  assert guards.most_severe(events) == 'stop'
  gains = guard.probe(35, profile(gain=math.nan))
  assert gains == []  # the same trouble, still
  assert 'composite gain is 11 (bound 10)' in str(events[0])


def test_only_what_should_be_doubly_stochastic_is_held_to_it():
  for kind, number in (('hc', 0), ('orthogonal', 0), ('mhc', 1)):
    assert len(of(kind).probe(1, profile(residual=2.0))) == number


def test_what_a_guard_knows_survives_json():
  whole, half = of(), of()
  losses = np.random.default_rng(1).normal(3, 0.3, 90).tolist()
  losses[70] = 9.0
  events = told(whole, losses)
  assert [e.step for e in events] == [71]
  assert told(half, losses[:40]) == []
  again = of()
  again.restore(json.loads(json.dumps(half.state())))
  later = []
  for number, loss in enumerate(losses[40:], 41):
    values = {'loss/train': loss, 'grad/global_norm': 1.0}
    later += again.step(number, again.loss_limit(), values)
  assert later == events
  assert again.state() == whole.state()


def test_settings_that_cannot_be():
  with pytest.raises(ValueError, match=r"guards\.gain='skip_step' must be one"):
    config_lib.GuardsConfig(gain='skip_step')
  with pytest.raises(ValueError, match=r'rollback_rate=2\.0 must be at most 1'):
    config_lib.GuardsConfig(rollback_rate=2)
  with pytest.raises(ValueError, match=r'spike_window=3 must be at least 16'):
    config_lib.GuardsConfig(spike_window=3)


TINY = dataclasses.replace(
  TINY_RUN,
  model=TINY_RUN.model.plain,
  num_steps=30,
  eval_every=0,
  eval_sequences=4,
  probe_every=0,
  checkpoint_every=10,
)


def run(text, workdir, monkeypatch, bad=(), **settings):
  """Trains; steps of the data numbered in `bad` have a loss that is NaN.

  Returns the events, the losses, and the numbers of the batches that the state
  was made from.
  """
  config = dicts.replace(TINY, data=dict(path=text), **settings)
  seen = []
  dispatch = loop.Loop._dispatch

  def watched(self):
    number = self._batches.get_state()['next_index']
    if number in bad:
      poison = jnp.full(self._state.params['norm']['gain'].shape, jnp.nan)
      good = self._state.params['norm']['gain'].copy()
      self._state.params['norm']['gain'] = jax.device_put(poison, good.sharding)
    seen.append(number)
    pending = dispatch(self)
    if number in bad and config.guards.nonfinite == 'skip_step':
      self._state.params['norm']['gain'] = good
    return pending

  monkeypatch.setattr(loop.Loop, '_dispatch', watched)
  try:
    run_lib.train(config, workdir)
  finally:
    events = json_lines.read_lines(workdir / 'events.jsonl')
  lines = json_lines.read_lines(workdir / 'metrics.jsonl')
  return events, lines, seen


@pytest.fixture(scope='module')
def skipping(text):
  """The programs of a run whose guards skip steps, its settings and a batch."""
  config = dicts.replace(
    TINY,
    data=dict(path=text),
    guards=dict(
      nonfinite='skip_step', loss_spike='skip_step', rollback_rate=0.5
    ),
    optimizer=dict(name='muon', muon='deepseek_v4', warmup_steps=9),
  )
  programs = step.build(config)
  batch = next(
    batches.train_batches(
      mixture_lib.load(config), config.data, 0, config.model.vocab_size
    )
  )
  return programs, config, partition.put(batch, programs.mesh, partition.BATCH)


def test_a_step_is_skipped_on_the_device(skipping):
  """A refused update counts and changes nothing."""
  programs, _, tokens = skipping
  for factor, limit in ((math.nan, math.inf), (1.0, 1.0)):
    state = generic_states.state(programs)
    state.params['norm']['gain'] *= factor
    before = jax.device_get(state)
    new, metrics = programs.train(
      state, tokens, programs.inputs(loss_limit=limit)
    )
    assert metrics['optimizer/skipped'] == 1
    assert new.step == 1
    for a, b in zip(
      jax.tree.leaves(new._replace(step=0)),
      jax.tree.leaves(before._replace(step=0)),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
  state = generic_states.state(programs)
  newer, metrics = programs.train(state, tokens, programs.inputs())
  assert metrics['optimizer/skipped'] == 0
  assert newer.params['norm']['gain'][0] != before.params['norm']['gain'][0]


def test_the_rate_is_that_of_the_step_after_skips_and_rollbacks(skipping):
  """Updates by it, and the metric tells it; Adam's moments know no skips."""
  programs, config, tokens = skipping

  def moved(num_skipped, rate):
    """The change of the parameters by the first update that is made."""
    state = generic_states.state(programs)
    before = jax.device_get(state.params)
    for _ in range(num_skipped):
      state, _ = programs.train(state, tokens, programs.inputs(loss_limit=-1.0))
    state, metrics = programs.train(state, tokens, programs.inputs(rate=rate))
    change = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    return change, float(metrics['optimizer/learning_rate'])

  first, first_rate = moved(0, 1.0)
  peak = config.optimizer.learning_rate
  np.testing.assert_allclose(first_rate, peak / 10, rtol=1e-6)
  for num_skipped, factor, want in ((4, 1.0, 0.5), (0, 0.5, 0.05)):
    change, rate = moved(num_skipped, factor)
    np.testing.assert_allclose(rate, peak * want, rtol=1e-6)
    for a, b in zip(
      jax.tree.leaves(change), jax.tree.leaves(first), strict=True
    ):
      np.testing.assert_allclose(a, b * want * 10, rtol=1e-3, atol=1e-6)


def test_a_rollback_goes_on_after_the_trouble(text, tmp_path, monkeypatch):
  policy = dict(nonfinite='rollback', rollback_rate=0.5)
  events, lines, seen = run(
    text, tmp_path / 'run', monkeypatch, bad=(13,), guards=policy
  )
  first, second = events
  assert (first['step'], first['guard']) == (14, 'nonfinite')
  assert (second['guard'], second['value']) == ('rollback', 10)
  assert [line['step'] for line in lines] == list(range(1, 31))
  assert all(line['loss/train'] is not None for line in lines)
  # The batch after the bad one was under way when it was noticed.
  assert seen == [*range(15), *range(14, 34)]


def test_rollbacks_are_repeated_exactly_after_a_kill(
  text, tmp_path, monkeypatch
):
  settings = dict(guards=dict(nonfinite='rollback', rollback_rate=0.5))
  want = run(text, tmp_path / 'a', monkeypatch, bad=(22, 24), **settings)

  def killed(self):
    if self._step == 15 and self._guards.memory.rollbacks == 2:
      raise KeyboardInterrupt
    return look(self)

  monkeypatch.undo()
  look = loop.Loop._dispatch
  with monkeypatch.context() as patch:
    patch.setattr(loop.Loop, '_dispatch', killed)
    with pytest.raises(KeyboardInterrupt):
      run(text, tmp_path / 'b', patch, bad=(22, 24), **settings)
  got = run(text, tmp_path / 'b', monkeypatch, bad=(22, 24), **settings)
  assert got[0] == want[0]
  assert len(got[0]) == 4
  one, other = (
    [
      {k: v for k, v in line.items() if not k.startswith('time/')}
      for line in lines
    ]
    for _, lines, *_ in (got, want)
  )
  assert one == other


def test_a_state_that_leads_into_trouble_again_is_not_taken_a_third_time(
  text, tmp_path, monkeypatch
):
  events, lines, _ = run(
    text,
    tmp_path / 'run',
    monkeypatch,
    bad=(22, 24, 26, 37),
    guards=dict(nonfinite='rollback', rollback_rate=0.5),
  )
  back = [e['value'] for e in events if e['guard'] == 'rollback']
  # The second and third time nothing came between; the last is kept.
  assert back == [20, 10, 10, 20]
  assert [line['step'] for line in lines] == list(range(1, 31))


def test_a_guard_stops_a_run(text, tmp_path, monkeypatch):
  with pytest.raises(guards.Stop, match=r'step 6: nonfinite: loss is nan'):
    run(
      text,
      tmp_path / 'run',
      monkeypatch,
      bad=(5,),
      guards=dict(nonfinite='stop', rollback_rate=0.5),
    )
  with pytest.raises(guards.Stop, match=r'2 rollbacks are more than'):
    run(
      text,
      tmp_path / 'other',
      monkeypatch,
      bad=(5, 8),
      guards=dict(nonfinite='rollback', rollback_rate=0.5, max_rollbacks=1),
    )
