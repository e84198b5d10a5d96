"""The flag of a profile; tests/training/test_run.py makes one."""

import pytest

from mhc.training import profile


def test_a_range_of_steps():
  assert profile.steps(None) is None
  assert profile.steps('10:15') == (10, 15)
  assert profile.steps('3:3') == (3, 3)
  for text in ('', '10', '0:3', '5:4', '1:2:3', 'a:b', '-1:4', ' 1:2'):
    with pytest.raises(ValueError, match=r'is no range of steps.*write 10:15'):
      profile.steps(text)


def test_steps_that_are_past_are_told(tmp_path, capsys):
  profiler = profile.Profiler(tmp_path, profile.Steps(3, 5))
  with profiler.step(6):
    pass
  assert not profiler.is_last(6)
  profiler.close()
  said = capsys.readouterr().err
  assert 'this start has trained none of the steps 3 to 5' in said
  profiler.close()
  assert capsys.readouterr().err == ''


def test_a_profile_that_cannot_be_written_costs_the_run_nothing(
  tmp_path, monkeypatch, capsys
):
  def full():
    raise RuntimeError('No space left')

  monkeypatch.setattr(profile.jax.profiler, 'start_trace', lambda *_, **__: 0)
  monkeypatch.setattr(profile.jax.profiler, 'stop_trace', full)
  profiler = profile.Profiler(tmp_path, profile.Steps(1, 2))
  with profiler.step(1):
    pass
  assert profiler.is_last(2)
  profiler.close()
  assert 'NOT WRITTEN: ' in capsys.readouterr().err
