"""One trial of harness.py; fifty are run by hand."""

import random

import faults
import harness
import kinds
import pytest

pytestmark = pytest.mark.long

STEPS = 6 * harness.SAVE_EVERY


@pytest.fixture
def forked(mains, compiled, tmp_path, monkeypatch):
  """Runs that end by themselves are forked, with what others compiled."""
  forked, environment = mains
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  (tmp_path / 'trials').mkdir()
  compiled.mkdir(exist_ok=True)
  (tmp_path / 'trials' / 'compiled').symlink_to(compiled)

  def finish(run):
    done = forked.run(run.command[1:])
    run.log += done.stderr
    assert 'Traceback' not in done.stderr
    assert done.returncode == 0, done.stderr
    assert (run.workdir / 'summary.json').exists()

  monkeypatch.setattr(harness.Run, 'finish', finish)


@pytest.mark.usefixtures('forked')
def test_a_run_survives(tmp_path, monkeypatch):
  """A SIGKILL, and bits flipped in its newest checkpoint; of a short run."""
  monkeypatch.setattr(kinds, 'STEPS', STEPS)
  monkeypatch.setitem(harness.SETTINGS, 'num_steps', STEPS)
  chosen = [kinds.ALL['flipped']]
  (trial,) = harness.trials(tmp_path / 'trials', 1, 0, chosen, jobs=1)
  assert trial.fault == 'flipped'
  assert trial.survived, trial.said
  assert 0 < trial.goodput < 1
  assert trial.lost_steps > 0


def test_failures_are_reported(tmp_path):
  """A run that ends with other results, and one that does not finish."""
  run = harness.Run(tmp_path / 'run' / 'run', tmp_path / 'no such text')
  with pytest.raises(harness.Failure, match=r'status 2.*no such text'):
    run.finish()
  lines = [{'step': 1, 'loss/train': 2.0}]
  state = {'w': 1.0}
  harness.compare((lines, state), (lines, state))
  for other in (
    ([{'step': 1, 'loss/train': 2.5}], state),
    (lines * 2, state),
    (lines, {'w': 2.0}),
  ):
    with pytest.raises(harness.Failure):
      harness.compare(other, (lines, state))
  # Where records may be lost, those that are left must be the same.
  harness.compare(([], state), (lines, state), whole=False)
  with pytest.raises(harness.Failure):
    harness.compare(([], state), (lines, state))
  with pytest.raises(harness.Failure):
    harness.compare((lines, {'w': 2.0}), ([], state), whole=False)


def test_files_are_damaged(tmp_path):
  chance = random.Random(0)
  small, large = tmp_path / 'a', tmp_path / 'folder' / 'b'
  large.parent.mkdir()
  small.write_bytes(b'a' * 10)
  large.write_bytes(bytes(1000))
  assert faults.largest(tmp_path) == large
  faults.flip(large, chance)
  data = large.read_bytes()
  assert len(data) == 1000
  assert 1 <= sum(byte.bit_count() for byte in data) <= 8
  faults.truncate(large, chance)
  assert len(large.read_bytes()) < 1000
