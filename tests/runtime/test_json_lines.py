"""Lines of a run: what is resumed is what was saved, or a line says so."""

import json

import pytest

from mhc.runtime import json_lines


def steps(path):
  return [line['step'] for line in json_lines.read_lines(path)]


def written(path, last):
  """A file of so many steps; and its position after step 4."""
  lines = json_lines.JsonLines(path, 0)
  for step in range(1, last + 1):
    lines.write(step, {'x': float('nan') if step == 2 else step / 3})
    if step == 4:
      position = lines.position()
  lines.close()
  return json.loads(json.dumps(position))


def test_lines_past_the_saved_position_are_cut(tmp_path, capsys):
  path = tmp_path / 'lines.jsonl'
  position = written(path, 6)
  with path.open('a') as file:
    file.write('{"step": 7, "x"')  # a kill in the middle of a line
  lines = json_lines.JsonLines(path, 4, position)
  lines.write(5, {'x': 7})
  lines.close()
  got = [(line['step'], line['x']) for line in json_lines.read_lines(path)]
  assert got == [(1, 1 / 3), (2, None), (3, 1.0), (4, 4 / 3), (5, 7)]
  assert not lines.damage
  assert capsys.readouterr().err == ''
  # A state of an earlier version has no position.
  json_lines.JsonLines(path, 3).close()
  assert steps(path) == [1, 2, 3]


def remove(path):
  path.unlink()
  return []


def empty(path):
  path.write_bytes(b'')
  return []


def cut(path):
  path.write_bytes(path.read_bytes()[:45])
  return [1]


def alter_a_number(path):
  path.write_bytes(path.read_bytes().replace(b'"x": 1.0', b'"x": 1.5'))
  return [1, 2, 3, 4]


def bytes_of_no_text(path):
  first, *rest = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b''.join([first, b'\xff\xfe\x80\n', *rest[1:]]))
  return [1, 3, 4]


def other_json(path):
  path.write_text('null\n[]\n3\n{"step": "x"}\n{}\n' + '[' * 9999 + '\n')
  return []


@pytest.mark.parametrize(
  'damage',
  [remove, empty, cut, alter_a_number, bytes_of_no_text, other_json],
)
def test_lines_that_are_lost_are_told_and_kept_aside(damage, tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  position = written(path, 6)
  left = damage(path)
  found = path.read_bytes() if path.exists() else b''
  lines = json_lines.JsonLines(path, 4, position)
  lines.write(5, {'x': 7})
  lines.close()
  assert steps(path) == [*left, 5]
  said = capsys.readouterr().err
  assert said.count('RECORDS LOST') == said.count('\n') == 1
  assert str(path) in lines.damage
  assert '4 lines' in lines.damage
  aside = tmp_path / 'metrics.jsonl.old'
  assert (aside.read_bytes() if found else b'') == found
  # What goes on now is what the next state is saved with.
  lines = json_lines.JsonLines(path, 5)
  position = lines.position()
  lines.close()
  again = json_lines.JsonLines(path, 5, position)
  assert not again.damage
  again.close()


class Full:
  """A file on a disk with room for so many bytes."""

  def __init__(self, file, room):
    self.file, self.room = file, room

  def write(self, data):
    self.room -= (taken := min(self.room, len(data)))
    return self.file.write(data[:taken])

  def __getattr__(self, name):
    return getattr(self.file, name)


def test_lines_wait_for_room_on_the_disk(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  lines = json_lines.JsonLines(path, 0)
  lines.write(1, {'loss': 1.0})
  lines._file = Full(lines._file, 30)
  for step in (2, 3, 4):
    lines.write(step, {'loss': 1.0})
  # Nothing half-written, and said once.
  assert steps(path) == [1, 2]
  assert path.read_text().endswith('}\n')
  assert capsys.readouterr().err.count('NOT WRITTEN') == 1
  saved = lines.position()
  lines._file.room = 10_000
  lines.write(5, {'loss': 1.0})
  lines.close()
  assert steps(path) == [1, 2, 3, 4, 5]
  # A state that was saved meanwhile knows of the lines that waited.
  json_lines.JsonLines(path, 4, saved).close()
  assert steps(path) == [1, 2, 3, 4]
