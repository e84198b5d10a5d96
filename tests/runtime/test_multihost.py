"""Processes that train one run together, and what becomes of them all.

Two train as one would, and from what they saved together one goes on alone with
another mesh. tests/slow/multi_process.py does so at length;
tests/fault_injection kills one of two.
"""

import pytest
from slow import multi_process as full

from mhc.runtime import json_lines
from mhc.runtime import multihost
from mhc.training import evaluate
from mhc.training import workdir as workdir_lib

pytestmark = [
  pytest.mark.long,
  pytest.mark.usefixtures('optax_promotion'),
]

STEPS, SAVED = 6, 3
CHANGES = dict(
  num_steps=STEPS,
  model=dict(connection=dict(kind='residual'), recompute='none'),
  mesh=dict(num_devices=4, pipe=2, schedule='1f1b'),
  eval_every=0,
  probe_every=0,
  checkpoint_every=SAVED,
)


@pytest.fixture(scope='module')
def changes(tmp_path_factory):
  text = full.write_text(tmp_path_factory.mktemp('text'))
  return full.merge(full.TINY, CHANGES, text)


@pytest.fixture(scope='module')
def together(changes, tmp_path_factory):
  """The folder of two processes."""
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  launcher = full.start(workdir, changes, 2, 2)
  status, out, error = full.finish(launcher, timeout=240)
  assert status == 0, error
  # Only the first one speaks.
  assert out.count('held-out loss') == 1
  assert '[1] held-out loss' not in out
  assert '[1]' not in error
  return workdir


def test_the_same_losses_as_one_process_with_another_mesh(
  together, changes, tmp_path
):
  """From the start, and from what the two saved half-way."""
  other = dict(mesh=dict(num_devices=2, pipe=1), data=dict(microbatch_size=0))
  other = full.merge(changes, other)
  one, copy = tmp_path / 'one', full.half_way(together, SAVED)
  for workdir in (one, copy):
    full.alone(workdir, other)
    far = full.difference(workdir, together)
    assert far.keys() >= {'loss/train', 'loss/heldout', 'grad/global_norm'}
    assert max(far.values()) < full.BOUND
  names = sorted(path.name for path in one.iterdir())
  assert sorted(path.name for path in together.iterdir()) == names
  probes = json_lines.read_lines(together / 'probes.jsonl')
  assert [probe['step'] for probe in probes] == [STEPS]
  # The folder says with what the run ended, and can be evaluated so.
  assert workdir_lib.read_config(copy).mesh.pipe == 1
  assert workdir_lib.read_config(together).mesh.pipe == 2
  scores = evaluate.evaluate_checkpoint(copy, None, 8)
  last = json_lines.read_lines(together / 'metrics.jsonl')[-1]
  assert scores['loss/heldout'] == pytest.approx(last['loss/heldout'], rel=1e-5)


def test_what_one_refuses_ends_all(together, changes):
  """The first process finds that the folder is another run's."""
  before = sorted(together.rglob('*'))
  launcher = full.start(together, full.merge(changes, dict(seed=7)), 2, 2)
  status, _, error = full.finish(launcher, timeout=240)
  assert status == 2
  lines = sorted(error.strip().splitlines(), reverse=True)
  assert len(lines) == 2, error
  first, second = lines
  assert first.startswith('error in process 0: ')
  assert second.startswith('[1] error in process 1: process 0 cannot go on: ')
  assert all('seed=0, this one has 7' in line for line in (first, second))
  assert sorted(together.rglob('*')) == before


LONELY = """
import sys, time
index = int(sys.argv[-1].removeprefix('--process_id='))
print('here', index, flush=True)
time.sleep(0 if index == 1 else 600)
sys.exit(3)
"""


def test_the_launcher_leaves_no_one_behind(tmp_path):
  script = tmp_path / 'lonely.py'
  script.write_text(LONELY)
  launcher = full.launch(2, 1, script)
  status, out, _ = full.finish(launcher, timeout=240)
  assert status == 3
  assert sorted(out.splitlines()) == ['[1] here 1', 'here 0']


def test_one_process_agrees_with_itself():
  assert (multihost.index(), multihost.count()) == (0, 1)
  assert multihost.all_gather_text('ä') == ['ä']
  assert multihost.broadcast_from_first({'a': [1, None]}) == {'a': [1, None]}
  multihost.assert_same({'a': 1})
  with pytest.raises(OSError, match='full'), multihost.raise_together():
    raise OSError('full')
  assert not multihost.stopping(1)


def test_processes_that_differ_are_named(monkeypatch):
  """With what two others would have said."""
  said = ['{"seed": "0", "jax": "1"}', '{"seed": "0", "jax": "2"}']
  monkeypatch.setattr(multihost, 'all_gather_text', lambda _: said)
  with pytest.raises(multihost.RunRefused, match=r'jax is 1 .* 2 in process 1'):
    multihost.assert_same({})
  monkeypatch.setattr(
    multihost, 'all_gather_text', lambda _: ['', ' no such file']
  )
  with (
    pytest.raises(multihost.RunRefused, match=r'process 1 .*no such file'),
    multihost.raise_together(),
  ):
    pass
