"""Files, records and leases in a bucket of a server on this machine."""

import concurrent.futures
import contextlib
import json
import time

import bucket_server
import numpy as np
import pytest

from mhc.runtime import files
from mhc.runtime import json_lines
from mhc.runtime import leases
from mhc.runtime import paths
from mhc.runtime import retry
from mhc.runtime import shadow


def test_files(bucket):
  file = bucket / 'a.json'
  files.replace(file, '{"a": 1}')
  assert files.read_json(file) == {'a': 1}
  before = files.stamp(file)
  assert files.size(file) == 8
  assert files.stamp(file) == before
  files.replace(file, '{"a": 2}')
  assert files.size(file) == 8
  assert files.stamp(file) != before
  assert files.set_aside(file).name == 'a.json.old'
  files.replace(file, '[]')
  with pytest.raises(ValueError, match=r'gs://.*a\.json is damaged'):
    files.read_json(file)
  assert files.set_aside(file).name == 'a.json.old-2'
  assert sorted(p.name for p in bucket.iterdir()) == [
    'a.json.old',
    'a.json.old-2',
  ]


def test_arrays(bucket):
  array = np.arange(12.0).reshape(3, 4)
  files.replace_array(bucket / 'x.npy', array)
  data = retry.stream(bucket / 'x.npy')
  assert np.array_equal(np.load(data), array)


def test_what_fails_while_it_is_written_leaves_the_old(bucket):
  files.replace(bucket / 'a', 'old')

  def write():
    with files.replacing(bucket / 'a') as file:
      file.write(b'new')
      raise RuntimeError

  with pytest.raises(RuntimeError):
    write()
  assert (bucket / 'a').read_bytes() == b'old'


def test_folders_move_and_go(bucket):
  for name in ('f/a', 'f/g/b', 'other'):
    files.replace(bucket / name, name)
  files.move(bucket / 'f', bucket / 'damaged/f')
  assert not (bucket / 'f').exists()
  assert (bucket / 'damaged/f/g/b').read_bytes() == b'f/g/b'
  files.delete_tree(bucket / 'damaged')
  files.delete_tree(bucket / 'damaged')  # nothing is left to do
  assert [p.name for p in bucket.iterdir()] == ['other']


def test_reads_at_random_and_in_order(bucket):
  data = np.random.default_rng(0).bytes(100_000)
  with files.replacing(bucket / 'x') as file:
    file.write(data)
  file = retry.File(bucket / 'x')
  assert file.pread(0, 10) == data[:10]
  assert file.pread(99_990, 100) == data[99_990:]  # to the end, not beyond
  assert file.pread(100_000, 1) == file.pread(200_000, 1) == b''
  with retry.stream(bucket / 'x') as stream:
    stream.seek(-100_000, 2)
    assert stream.read() == data
  with pytest.raises(FileNotFoundError):
    retry.File(bucket / 'none').pread(0, 1)


def test_what_others_write_is_seen_at_once(bucket):
  """A file system of gcsfs would remember its lists."""
  files.replace(bucket / 'a', '')
  assert len([*bucket.iterdir()]) == 1
  assert not (bucket / 'b').exists()
  other = type(paths.filesystem(bucket))(
    use_listings_cache=False, skip_instance_cache=True
  )
  other.pipe_file(str(bucket / 'b'), b'')
  assert len([*bucket.iterdir()]) == 2
  assert (bucket / 'b').exists()


def test_a_bucket_that_is_not_there_is_refused(bucket):
  assert paths.given(str(bucket), '--workdir') == str(bucket)
  with pytest.raises(ValueError, match='there is no gs://no-such-bucket'):
    paths.given('gs://no-such-bucket/x', '--workdir')


def test_errors_of_the_service_are_os_errors(monkeypatch):
  class HttpError(Exception):
    __module__ = 'gcsfs.retry'

  calls = []

  def fails(times, error):
    calls.append(0)
    if len(calls) <= times:
      raise error
    return 'done'

  monkeypatch.setattr(retry, 'sleep', lambda seconds: None)
  # A transient one, for all that is known.
  assert retry.with_retries(lambda: fails(3, HttpError('503')), 'x') == 'done'
  with pytest.raises(OSError, match='quota'):
    retry.with_retries(lambda: fails(10**6, HttpError('quota')), 'gs://b/x')
  with pytest.raises(KeyError):  # is no one's service
    retry.as_os_error(lambda: fails(10**6, KeyError('x')), 'x')


def lines(path, position=None, last=10**6):
  return json_lines.JsonLines(path, last, position)


def test_lines_are_uploaded_at_positions_and_at_the_end(bucket):
  file = lines(bucket / 'm.jsonl')
  file.write(1, {'a': 1})
  assert not (bucket / 'm.jsonl').exists()
  position = file.position()
  assert len(json_lines.read_lines(bucket / 'm.jsonl')) == 1
  file.write(2, {'a': 2})
  assert len(json_lines.read_lines(bucket / 'm.jsonl')) == 1
  file.close()
  assert len(json_lines.read_lines(bucket / 'm.jsonl')) == 2
  again = lines(bucket / 'm.jsonl', position, 1)
  assert again.dropped == [{'step': 2, 'a': 2}]
  assert not again.damage
  again.close()
  assert len(json_lines.read_lines(bucket / 'm.jsonl')) == 1


def test_the_newer_of_both_is_taken(bucket):
  path = bucket / 'm.jsonl'
  file = lines(path)
  file.write(1, {})
  position = file.position()
  file.write(2, {})  # and is killed: the second line is on this machine alone
  file._file.close()
  found = lines(path, position, 1)
  assert [line['step'] for line in found.dropped] == [2]
  found.write(2, {'again': True})
  found.close()
  # Another machine went on, this one has less, and takes the bucket's.
  place = shadow.place(path)
  place.write_bytes(place.read_bytes().splitlines(keepends=True)[0])
  with contextlib.closing(lines(path, position, 1)) as found:
    assert found.dropped == [{'step': 2, 'again': True}]
  # Nothing is left of the machine.
  place.unlink()
  with contextlib.closing(lines(path, position, 1)) as found:
    assert not found.damage


def test_a_deleted_run_does_not_come_back(bucket):
  file = lines(bucket / 'm.jsonl')
  file.write(1, {})
  file.close()
  files.delete_tree(bucket)
  again = lines(bucket / 'm.jsonl')
  assert not again.dropped
  again.close()
  assert not json_lines.read_lines(bucket / 'm.jsonl')
  folder = shadow.of_folder(bucket / 'tensorboard')
  (folder / 'old').write_bytes(b'')
  assert not [*shadow.of_folder(bucket / 'tensorboard').iterdir()]


def test_records_that_are_gone_from_the_bucket_are_said(bucket, capsys):
  file = lines(bucket / 'm.jsonl')
  file.write(1, {})
  position = file.position()
  file.close()
  (bucket / 'm.jsonl').unlink()
  with contextlib.closing(lines(bucket / 'm.jsonl', position, 1)) as found:
    assert 'is gone' in found.damage
  assert 'RECORDS LOST' in capsys.readouterr().err


def test_an_upload_that_fails_is_said_and_made_up_for(
  bucket, monkeypatch, capsys
):
  file = lines(bucket / 'm.jsonl')
  file.write(1, {})
  system = paths.filesystem(bucket)
  with monkeypatch.context() as patched:

    def put_file(*_, **__):
      raise OSError('the network is gone')

    patched.setattr(system, 'put_file', put_file)
    file.position()
    file.position()
  assert capsys.readouterr().err.count('NOT UPLOADED') == 1
  assert not (bucket / 'm.jsonl').exists()
  file.close()
  assert len(json_lines.read_lines(bucket / 'm.jsonl')) == 1


def test_folders_are_uploaded_as_they_change(bucket):
  path = bucket / 'tensorboard'
  folder = shadow.of_folder(path)
  (folder / 'deep').mkdir()
  (folder / 'deep/a').write_text('1')
  shadow.upload(path)
  assert (path / 'deep/a').read_text() == '1'
  (path / 'deep/a').unlink()
  shadow.upload(path)  # it has not changed
  assert not (path / 'deep/a').exists()
  (folder / 'deep/a').write_text('12')
  shadow.upload(path)
  assert (path / 'deep/a').read_text() == '12'


def test_one_of_many_takes_a_job(bucket):
  ended = []
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    taken = [
      *pool.map(
        lambda _: leases.take(
          bucket / 'lock', 'run', leases.Watcher(), ended.append
        ),
        range(8),
      )
    ]
  (lease,) = filter(None, taken)
  assert leases.held_by(bucket / 'lock', 'run').startswith('host')
  watcher = leases.Watcher()
  assert watcher.free(bucket / 'lock', ['run', 'else']) == ['else']
  with pytest.raises(ValueError, match='is in use by'):
    leases.take_when_free(bucket / 'lock', 'run', 1.0)
  lease.release()
  assert leases.held_by(bucket / 'lock', 'run').startswith('nobody')
  with leases.take(bucket / 'lock', 'run', watcher) as second:
    assert second.generation == 1
    assert not ended


def test_a_silent_holder_of_another_machine_is_followed(bucket):
  folder = bucket / 'lock'
  claim = {'host': 'gone', 'pid': 1, 'boot': 'x', 'pid_namespace': 'y'}
  files.replace(folder / 'run.0', json.dumps(claim))
  start = time.monotonic()
  with leases.take_when_free(folder, 'run', 0.5) as lease:
    assert time.monotonic() - start >= 0.5
    assert lease.generation == 1
    time.sleep(0.3)  # a few signs of life
    first = (folder / 'run.1').read_bytes()
    time.sleep(0.3)
    assert (folder / 'run.1').read_bytes() != first


def test_a_service_that_fails_and_is_slow(tmp_path, monkeypatch):
  """Connections that end in the middle of an upload, answers of 503, delays."""
  with bucket_server.Bucket(delay_s=0.02, failures=0.15) as running:
    for name, value in running.settings.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, 'sleep', lambda seconds: None)
    import gcsfs

    system = gcsfs.GCSFileSystem(
      use_listings_cache=False, skip_instance_cache=True
    )
    monkeypatch.setattr(paths, 'filesystem', lambda path: system)
    folder = paths.path(f'{bucket_server.URL}/slow')
    for number in range(12):
      data = np.random.default_rng(number).bytes(10_000)
      with files.replacing(folder / 'x') as file:
        file.write(data)
      assert retry.File(folder / 'x').pread(0, 10_000) == data
    files.move(folder / 'x', folder / 'y')
    assert retry.File(folder / 'y').pread(0, 10_000) == data
    assert leases.take(folder, 'job', leases.Watcher()) is not None
