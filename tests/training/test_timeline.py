"""Where the time went, over starts that were killed and rolled back."""

import json

import pytest

from mhc.training import timeline


def write(workdir, *lines):
  names = 'time', 'what', 'step', 'lost', 'lost_s', 'counted_s', 'seconds'
  text = (
    json.dumps(dict(zip(names, line, strict=True))) + '\n' for line in lines
  )
  (workdir / timeline.FILE).write_text(''.join(text))


def test_a_run_of_one_start(tmp_path):
  assert timeline.goodput(tmp_path) is None
  write(
    tmp_path,
    (1000, 'start', 0, 0, 0, 0, {'starting': 4, 'compiling the step': 6}),
    (
      1090,
      'end',
      9,
      0,
      0,
      0,
      {'starting': 4, 'compiling the step': 6, 'training': 80, 'saving': 10},
    ),
  )
  found = timeline.goodput(tmp_path)
  assert found['wall_s'] == 100
  assert found['share'] == 0.8
  assert found['starts'] == 1
  assert found['lost_steps'] == {'start': 0, 'rollback': 0}
  assert found['seconds']['unknown'] == 0


def test_what_kills_and_rollbacks_cost(tmp_path):
  write(
    tmp_path,
    (1000, 'start', 0, 0, 0, 0, {'starting': 10}),
    (1040, 'saved', 4, 0, 0, 0, {'starting': 10, 'training': 40}),
    # Killed at 1060, two steps after it saved; started again at 1100.
    (1110, 'start', 4, 2, 20, 0, {'starting': 10}),
    (1140, 'rollback', 6, 1, 10, 10, {'starting': 10, 'training': 30}),
    (1170, 'end', 9, 0, 0, 0, {'starting': 10, 'training': 60}),
  )
  found = timeline.goodput(tmp_path)
  assert found['wall_s'] == 180
  assert found['starts'] == 2
  assert found['lost_steps'] == {'start': 2, 'rollback': 1}
  assert found['lost_s'] == {'start': 20, 'rollback': 10}
  # Of 100 s of training that were told, 10 were rolled back.
  assert found['share'] == pytest.approx(90 / 180)
  assert found['seconds']['unknown'] == 60  # 20 of it trained in vain


def test_lines_that_are_written_are_read(tmp_path):
  steps = [{'step': s, 'time/step_s': 2.0} for s in (3, 4, 5, 6)]
  first = timeline.Timeline(tmp_path)
  first.mark('start', 0)
  first.mark('saved', 4)
  first.close()
  # The state after step 2 is restored: 3 and 4 had been counted.
  second = timeline.Timeline(tmp_path)
  second.mark('start', 2, steps)
  second.mark('rollback', 5, steps[-1:])
  second.close()
  lines = [
    json.loads(line)
    for line in (tmp_path / timeline.FILE).read_text().splitlines()
  ]
  assert [line['what'] for line in lines] == [
    *('start', 'saved', 'start', 'rollback')
  ]
  assert [line['lost'] for line in lines] == [0, 0, 4, 1]
  assert [line['counted_s'] for line in lines] == [0, 0, 4, 2]
  found = timeline.goodput(tmp_path)
  assert found['lost_s'] == {'start': 8, 'rollback': 2}
  assert found['starts'] == 2
