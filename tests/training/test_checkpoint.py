"""States on disk: what is damaged is set aside, what is foreign refused."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import shutil
import tempfile
import threading

import folders
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import files
from mhc.training import checkpoint
from mhc.training import checkpoint_record
from mhc.training import checksum
from mhc.training import state as state_lib
from mhc.training import workdir as workdir_lib

CONFIG = config_lib.Config(keep_checkpoints=2, checkpoint_every=4, keep_every=8)


def state(number, size=300):
  """Some numbers in the place of a trained state."""
  rng = np.random.default_rng(number)
  w = jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
  return state_lib.TrainState(
    jnp.int32(number), {'a': {'w': w}}, (w * 2,), None
  )


def abstract(like=None):
  like = state(0) if like is None else like
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
  )


def equal(a, b):
  return all(
    np.array_equal(x, y)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
  )


@pytest.fixture
def workdir(tmp_path):
  workdir_lib.initialize(tmp_path / 'run', CONFIG)
  return tmp_path / 'run'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A run with states after 8, 16 and 20 updates."""
  workdir = tmp_path_factory.mktemp('saved') / 'run'
  workdir_lib.initialize(workdir, CONFIG)
  with checkpoint.Checkpoints(workdir, CONFIG) as checkpoints:
    for number in (4, 8, 12, 16, 20):
      checkpoints.save(state(number), {'data': {'next': number}, 'x': 0.1})
  return workdir


def test_newest_and_multiples_are_kept(saved):
  with checkpoint.Checkpoints(saved, CONFIG, reading=True) as checkpoints:
    assert checkpoints.steps() == [20, 16, 8]
    found = checkpoints.restore(abstract())
  assert equal(found.state, state(20))
  assert found.extra == {'data': {'next': 20}, 'x': 0.1}


def test_a_state_that_is_changed_while_it_is_written(workdir):
  """Donated to the next update, as training does."""
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  current = state(4, size=200_000)
  want = jax.device_get(current)
  with checkpoint.Checkpoints(workdir, CONFIG) as checkpoints:
    checkpoints.save(current, {})
    for _ in range(5):
      current = update(current)
    jax.block_until_ready(current)
    like = abstract(state(4, size=200_000))
    assert equal(checkpoints.restore(like).state, want)


def arrays_of(where):
  """The file with the most numbers in it."""
  return max(files.all_files(where / 'state'), key=files.size)


def record_of(where):
  return where / 'record' / 'metadata'


def truncate(file):
  data = file.read_bytes()
  file.write_bytes(data[: len(data) // 2])


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def rewrite(where, **changes):
  """A record that is whole, and says something else."""
  signed = json.loads(record_of(where).read_text())
  record = signed['record'] | changes
  signed = {'record': record, 'sha256': checkpoint_record.digest(record)}
  record_of(where).write_text(json.dumps(signed))


def empty(where):
  files.delete_tree(where)
  where.mkdir(exist_ok=True)


def half_written(where):
  files.delete_tree(where / 'state')
  (where / 'record' / 'commit_success.txt').unlink(missing_ok=True)


def deny(where):
  """Also where tests run as root, whom no permission stops."""
  record_of(where).unlink()
  record_of(where).mkdir()


DAMAGES = {
  'missing file': lambda where: arrays_of(where).unlink(),
  'truncated': lambda where: truncate(arrays_of(where)),
  'flipped bit': lambda where: flip(arrays_of(where)),
  'empty folder': empty,
  'half written': half_written,
  'missing record': lambda where: record_of(where).unlink(),
  'truncated record': lambda where: truncate(record_of(where)),
  'flipped bit in the record': lambda where: flip(record_of(where)),
  'record of another state': lambda where: record_of(where).write_bytes(
    record_of(where.parent / '16').read_bytes()
  ),
  'a folder instead of a file': deny,
}
OF_A_DISK = 'empty folder', 'a folder instead of a file'


@pytest.mark.parametrize(
  'damage',
  [
    pytest.param(name, marks=[pytest.mark.on_disk] * (name in OF_A_DISK))
    for name in DAMAGES
  ],
)
def test_the_one_before_is_taken(saved, tmp_path, damage, capsys):
  workdir = tmp_path / 'run'
  folders.copy(saved, workdir)
  DAMAGES[damage](workdir / 'checkpoints' / '20')
  heard = []
  with checkpoint.Checkpoints(
    workdir, CONFIG, failed=lambda *what: heard.append(what)
  ) as checkpoints:
    found = checkpoints.restore(abstract())
    assert equal(found.state, state(16))
    assert found.extra['data'] == {'next': 16}
    # The number is free again.
    checkpoints.save(state(20), {})
    assert checkpoints.wait()
    assert equal(checkpoints.restore(abstract()).state, state(20))
  assert [number for number, _ in heard] == [20]
  assert [p.name for p in (workdir / 'damaged').iterdir()] == ['20']
  said = capsys.readouterr().err
  assert len(said.strip().splitlines()) == 1, said
  assert '20 is damaged' in said
  assert 'Traceback' not in said


def test_a_notebook_takes_the_one_before_too(saved, tmp_path, capsys, caplog):
  workdir = tmp_path / 'run'
  folders.copy(saved, workdir)
  truncate(arrays_of(workdir / 'checkpoints' / '20'))

  async def cell():
    with checkpoint.Checkpoints(workdir, CONFIG) as checkpoints:
      return checkpoints.restore(abstract())

  assert equal(asyncio.run(cell()).state, state(16))
  gc.collect()
  said = capsys.readouterr().err
  assert len(said.strip().splitlines()) == 1, said
  assert 'Requested byte range' in said
  assert not [r for r in caplog.records if r.name == 'asyncio']


def test_reading_changes_nothing(saved, tmp_path, capsys):
  workdir = tmp_path / 'run'
  folders.copy(saved, workdir)
  flip(arrays_of(workdir / 'checkpoints' / '20'))
  before = folders.names(workdir)
  assert equal(checkpoint.restore(workdir, abstract()), state(16))
  assert folders.names(workdir) == before
  assert 'passed over' in capsys.readouterr().err


def test_all_of_them_damaged_is_said(saved, tmp_path):
  workdir = tmp_path / 'run'
  folders.copy(saved, workdir)
  for where in (workdir / 'checkpoints').iterdir():
    flip(arrays_of(where))
  with (
    checkpoint.Checkpoints(workdir, CONFIG) as checkpoints,
    pytest.raises(ValueError, match=r'no intact checkpoint'),
  ):
    checkpoints.restore(abstract())


REFUSED = {
  'another version': (
    lambda where: rewrite(where, format='mhc checkpoint 9'),
    r"format 'mhc checkpoint 9'.*reads 'mhc checkpoint 1'",
  ),
  'another config': (
    lambda where: rewrite(
      where,
      config=json.loads(record_of(where).read_text())['record']['config']
      | {'optimizer.b1': 0.5},
    ),
    r'optimizer\.b1=0\.5, this one has 0\.9',
  ),
  'before there were records': (
    lambda where: files.move(where / 'record', where / 'data'),
    'earlier version',
  ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_is_whole_and_foreign_is_refused(saved, tmp_path, what):
  workdir = tmp_path / 'run'
  folders.copy(saved, workdir)
  change, message = REFUSED[what]
  change(workdir / 'checkpoints' / '20')
  with (
    checkpoint.Checkpoints(workdir, CONFIG) as checkpoints,
    pytest.raises(ValueError, match=message) as error,
  ):
    checkpoints.restore(abstract())
  assert '\n' not in str(error.value)
  assert not (workdir / 'damaged').exists()


def test_another_model_or_optimiser_is_refused(saved):
  wider = state(0, size=301)
  stateless = state(0)._replace(opt_state=())
  for other, name in ((wider, r'params\.a\.w'), (stateless, r'opt_state\.0')):
    with (
      checkpoint.Checkpoints(saved, CONFIG, reading=True) as checkpoints,
      pytest.raises(ValueError, match=rf'{name}.*choose another --workdir'),
    ):
      checkpoints.restore(abstract(other))


def test_names_of_single_pass_in_earlier_versions(tmp_path):
  config = dicts.replace(
    CONFIG,
    model=dict(
      num_blocks=1, dim=8, ffn_dim=8, connection=dict(kind='mhc_single_pass')
    ),
  )
  current = jax.jit(state_lib.init, static_argnums=0)(config, jax.random.key(0))
  earlier = checkpoint_record.renamed(current, 'next_mhc', 'inner')
  names = checksum.tree_checksums(earlier)
  assert 'params.dense_blocks.ffn_connection.inner.phi' in names
  assert any(n.startswith('opt_state') and '.inner.' in n for n in names)
  assert not any('next_mhc' in name for name in names)
  workdir_lib.initialize(tmp_path / 'run', config)
  with checkpoint.Checkpoints(tmp_path / 'run', config) as checkpoints:
    checkpoints.save(earlier, {})
  for want in (current, current._replace(opt_state=None)):
    found = checkpoint.restore(tmp_path / 'run', abstract(want))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert equal(found, want)


DENIED = {
  'arrays': arrays_of,
  'record': record_of,
  'folder of arrays': lambda where: where / 'state',
  'folder of the record': lambda where: where / 'record',
}


@pytest.mark.on_disk
@pytest.mark.parametrize('what', DENIED)
def test_what_may_not_be_read_is_not_called_damaged(saved, what, capsys):
  with tempfile.TemporaryDirectory() as folder_of_nobody:
    workdir = pathlib.Path(folder_of_nobody) / 'run'
    folders.copy(saved, workdir)
    denied = DENIED[what](workdir / 'checkpoints' / '20')
    denied.chmod(0)
    with (
      checkpoint.Checkpoints(workdir, CONFIG) as checkpoints,
      nobody(folder_of_nobody),
      pytest.raises(ValueError, match=r'20 may not be read: .*denied'),
    ):
      checkpoints.restore(abstract())
    assert denied.exists()
  assert not capsys.readouterr().err


@contextlib.contextmanager
def nobody(folder):
  """Root may read everything; tests may run as root."""
  if os.geteuid():
    yield
    return
  for path in (folder, *pathlib.Path(folder).rglob('*')):
    os.chown(path, 65534, 65534)
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_training_survives_a_disk_that_is_full(workdir, monkeypatch, capsys):
  heard = []
  with checkpoint.Checkpoints(
    workdir, CONFIG, failed=lambda *what: heard.append(what)
  ) as checkpoints:
    checkpoints.save(state(4), {})
    assert checkpoints.wait()

    def fail(*_, **__):
      raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, 'save', fail)
      checkpoints.save(state(8), {})
      assert not checkpoints.wait()
    assert [number for number, _ in heard] == [8]
    assert 'No space left' in heard[0][1]
    checkpoints.save(state(12), {})
    assert checkpoints.wait()
    assert checkpoints.steps() == [12, 4]
    assert equal(checkpoints.restore(abstract()).state, state(12))
  assert 'NOT SAVED: the state after step 8' in capsys.readouterr().err


@pytest.mark.on_disk
def test_a_folder_that_takes_nothing_leaves_no_thread_waiting():
  heard = []
  with tempfile.TemporaryDirectory() as folder_of_nobody:
    workdir = pathlib.Path(folder_of_nobody) / 'run'
    workdir_lib.initialize(workdir, CONFIG)
    with checkpoint.Checkpoints(
      workdir, CONFIG, failed=lambda *what: heard.append(what)
    ) as checkpoints:
      checkpoints.save(state(4), {})
      assert checkpoints.wait()
      before = set(threading.enumerate())
      (workdir / 'checkpoints').chmod(0o555)
      with nobody(folder_of_nobody):
        checkpoints.save(state(8), {})
        assert not checkpoints.wait()
      assert [number for number, _ in heard] == [8]
      assert 'Permission denied' in heard[0][1]
      for thread in set(threading.enumerate()) - before:
        if type(thread).__module__.startswith('orbax.'):
          thread.join(60)
          assert not thread.is_alive()
      (workdir / 'checkpoints').chmod(0o755)
      checkpoints.save(state(12), {})
      assert checkpoints.wait()
      assert checkpoints.steps() == [12, 4]


@pytest.mark.on_disk
def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
  checkpoint.check_room(tmp_path, abstract())
  free = shutil.disk_usage(tmp_path)._replace(free=9000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: free)
  assert checkpoint.state_bytes(abstract()) == 2 * 300 * 4 * 4 + 4
  with pytest.raises(OSError, match=r'0 MiB free and a checkpoint takes 0'):
    checkpoint.check_room(tmp_path, abstract())


def test_fingerprints_do_not_depend_on_the_mesh(monkeypatch):
  """Nor on whether the host computes them or the devices."""
  x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ('a', 'b'))
  want = checksum.tree_checksums({'x': jnp.asarray(x)})
  assert want.keys() == {'x'}
  monkeypatch.setattr(checksum, 'ON_HOST', -1)
  for spec in (P('a', 'b'), P('b'), P(None, 'a'), P()):
    spread = jax.device_put(x, NamedSharding(mesh, spec))
    assert checksum.tree_checksums({'x': spread}) == want


def test_fingerprints_see_every_bit_and_place(monkeypatch):
  x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
  seen = {checksum.tree_checksums([jnp.asarray(x)])['0']}
  for bit in range(32):
    bits = x.copy().view(np.uint32)
    bits[3, 2] ^= np.uint32(1) << np.uint32(bit)
    seen.add(checksum.tree_checksums([jnp.asarray(bits.view(np.float32))])['0'])
  seen |= {
    checksum.tree_checksums([jnp.asarray(y)])['0'] for y in (x[::-1], x.T, -x)
  }
  assert len(seen) == 36
  kinds = (jnp.int8, jnp.int32, jnp.bool_, jnp.bfloat16, jnp.float32)
  ones = [checksum.tree_checksums([jnp.ones(3, kind)])['0'] for kind in kinds]
  monkeypatch.setattr(checksum, 'ON_HOST', -1)
  for kind, one in zip(kinds, ones, strict=True):
    assert checksum.tree_checksums([jnp.ones(3, kind)])['0'] == one
  # Types are compared by name; of these the first three have the same bits.
  assert len(set(ones)) == 3


def test_settings_that_differ_are_named():
  old = json.loads(json.dumps(dicts.leaves(CONFIG)))
  assert workdir_lib.other_setting(old, CONFIG) == ''
  free = dataclasses.replace(CONFIG, keep_checkpoints=5)
  assert workdir_lib.other_setting(old, free) == ''
  other = dataclasses.replace(CONFIG, seed=3)
  assert workdir_lib.other_setting(old, other) == 'seed=0, this one has 3'
