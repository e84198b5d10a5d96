"""The states of a run, saved so that it can go on, and never believed unread.

    checkpoints/STEP/state   parameters, optimiser, biases, in order of depth
    checkpoints/STEP/record  what `state` is: format, settings, and of every
                             array type, shape and fingerprint; beside it what
                             else goes on from there (the position in the data)
    damaged/STEP             what turned out to be unreadable or not what was
                             written

A state is copied off the devices at once and written in the background, under a
temporary name that is dropped when all of it is there: a killed process leaves
the one before. Processes that train together write it together, each its part
of the arrays; other processes, on another mesh, can go on from it.

A state that is read is compared with its record, bit for bit. One that is
damaged is set aside and the one before it is taken; one that is whole but of
another run is refused, and so is a disk that does not let itself be read.
"""

from collections.abc import Callable, Mapping
import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import multihost
from mhc.training import checksum
from mhc.training import orbax_workarounds
from mhc.training import state as state_lib
from mhc.training import workdir as workdir_lib

FORMAT = 'mhc checkpoint 1'


class Damaged(Exception):
  """A checkpoint that is not what was written."""


class Saved(NamedTuple):
  """A state in order of depth, and what else was saved with it."""

  state: state_lib.TrainState
  extra: dict[str, Any]


def restore_model(
  workdir: pathlib.Path, device: jax.Device | None = None
) -> state_lib.TrainState:
  """The newest whole state of a run but for the optimiser's, on one device.

  A third of the bytes of a state are read, and no step is built.

  Args:
    workdir: the run's folder, which is not changed.
    device: by default the first one.

  Raises:
    ValueError: no run is there, it has no state yet, or none that is whole.
  """
  config = workdir_lib.read_config(workdir)
  return restore(workdir, state_lib.abstract_model(config.model, device))


def restore(
  workdir: pathlib.Path, abstract: state_lib.TrainState
) -> state_lib.TrainState:
  """The newest whole state of the run in `workdir`, which is not changed.

  Args:
    workdir: the run's folder.
    abstract: as for `Checkpoints.restore`.

  Raises:
    ValueError: it has none yet, or none that is whole.
  """
  saved = None
  if (workdir / workdir_lib.CHECKPOINTS).is_dir():
    config = workdir_lib.read_config(workdir)
    with Checkpoints(workdir, config, reading=True) as checkpoints:
      saved = checkpoints.restore(abstract)
  if saved is None:
    raise ValueError(f'{workdir} has no checkpoint yet: train it first')
  return saved.state


class Checkpoints:
  """The states saved under `workdir`; with `reading`, nothing is changed."""

  def __init__(
    self,
    workdir: pathlib.Path,
    config: config_lib.Config,
    *,
    reading: bool = False,
    failed: Callable[[int, str], None] = lambda step, reason: None,
  ):
    """`failed` hears of each state that could not be written, and why."""
    self._workdir, self._config = workdir.absolute(), config
    self._states = self._workdir / workdir_lib.CHECKPOINTS
    self._reading, self._failed = reading, failed
    self._writing: int | None = None
    self._last_save_ok = True  # so far, the last one
    self._open()
    self._closing = contextlib.ExitStack()
    self._closing.enter_context(orbax_workarounds.draining_event_loops())

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_):
    self.wait()
    self._manager.close()
    self._closing.close()

  def steps(self) -> list[int]:
    """Of the states there are, the newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: state_lib.TrainState, extra: Mapping[str, Any]):
    """Begins to save a state in order of depth under its number of updates.

    What could not be written is said, to the user and to `failed`; the run goes
    on, and tries again when it saves the next time.
    """
    self.wait()
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    record = _signed(
      {
        'format': FORMAT,
        'config': dicts.leaves(self._config),
        'arrays': _arrays(state),
        'extra': dict(extra),
      }
    )
    self._writing = step
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
    )
    self._attempt(lambda: self._begin(step, args))

  def wait(self) -> bool:
    """Until the last state is written; whether it was."""
    if self._writing is not None:
      self._attempt(self._written)
    return self._last_save_ok

  def restore(self, abstract: state_lib.TrainState) -> Saved | None:
    """The newest whole state; None if none was ever saved.

    Args:
      abstract: of a state in order of depth, with the shardings to restore to;
      without opt_state the optimiser's is not read.

    Raises:
      ValueError: one that is not damaged but of another run or version, one
        that may not be read, or if all there are are damaged.
    """
    self.wait()
    found = self.steps()
    for step in found:
      try:
        return self._read_twice(step, abstract)
      except Damaged as damage:
        self._set_aside(step, str(damage))
    if found:
      raise ValueError(
        f'{self._workdir} has no checkpoint that is whole, see the messages '
        'above: put one back, or start again with another --workdir'
      )
    return None

  def discard(self, step: int):
    """Deletes a state that is not to be taken again, if others are older.

    What led into trouble twice, with other data the second time, is part of it.
    One that has newer ones is left to `keep_checkpoints`, and so is the only
    one.
    """
    self.wait()
    newest, *older = self.steps() or [None]
    if newest == step and older:
      self._manager.delete(step)

  def _open(self):
    config = self._config
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if self._reading else config.keep_checkpoints,
      keep_period=config.keep_every or None,
      enable_async_checkpointing=not self._reading,
      cleanup_tmp_directories=not self._reading,
      create=not self._reading,
    )
    self._manager = ocp.CheckpointManager(self._states, options=options)

  def _begin(self, step, args):
    with multihost.raise_together():
      # Threads of Orbax would wait ten minutes for a folder it cannot make.
      if multihost.is_first():
        os.rmdir(tempfile.mkdtemp(dir=self._states))
    self._manager.save(step, args=args)

  def _written(self):
    self._manager.wait_until_finished()
    self._manager.check_for_errors()
    self._writing = None

  def _attempt(self, action):
    step = self._writing
    try:
      action()
      self._last_save_ok = True
    except Exception as error:  # what storage and Orbax raise has many classes
      self._writing, self._last_save_ok = None, False
      reason = _one_line(error)
      console.print_line(
        f'NOT SAVED: the state after step {step}: {reason}. Training goes on; '
        f'the last one on disk is {max(self._finished(), default="none")}.'
      )
      self._failed(step, reason)
      self._start_over()

  def _start_over(self):
    """Makes room and forgets the failed attempt."""
    if multihost.is_first():
      for leftover in self._states.glob('*tmp*'):
        shutil.rmtree(leftover, ignore_errors=True)
    with contextlib.suppress(Exception):  # the failure again, already said
      self._manager.close()
    self._open()

  def _finished(self):
    names = (p.name for p in self._states.iterdir())
    return [int(name) for name in names if name.isdigit()]

  def _read_twice(self, step, abstract):
    try:
      return self._read(step, abstract)
    except Damaged:
      # A shared disk may have had a bad moment.
      return self._read(step, abstract)

  def _read(self, step, abstract):
    where = self._states / str(step)
    old = where / 'data'
    if old.is_dir() and not (where / 'record').exists():
      raise ValueError(
        f'{where} is of an earlier version of mhc, without a record: go on '
        'with that version, or choose another --workdir'
      )
    args = {'record': ocp.args.JsonRestore()}
    record = _checked(self._load(step, args)['record'], where)
    difference = workdir_lib.other_setting(record['config'], self._config)
    if difference:
      raise ValueError(
        f'{where} is the state of a run with {difference}: it does not belong '
        'here'
      )
    ours = _shapes(abstract)
    theirs = {name: known[:2] for name, known in record['arrays'].items()}
    if abstract.opt_state is None:
      theirs = {
        n: v for n, v in theirs.items() if n.split('.')[0] != 'opt_state'
      }
    for name in theirs | ours:
      if ours.get(name) != theirs.get(name):
        raise ValueError(
          f'{where} holds {name}={theirs.get(name)}, this model and optimiser '
          f'have {ours.get(name)}: it does not belong here'
        )
    args = {'state': _restore_args(abstract)}
    loaded = self._load(step, args)['state']
    if not isinstance(loaded, dict):
      loaded = dict(zip(state_lib.TrainState._fields, loaded, strict=True))
    state = abstract._replace(**loaded)
    for name, digits in checksum.tree_checksums(state).items():
      if digits != record['arrays'][name][2]:
        raise Damaged(f'{name} is not what was written')
    if int(state.step) != step:
      raise Damaged(f'it is the state after step {int(state.step)}')
    return Saved(state, record['extra'])

  def _load(self, step, args):
    try:
      return orbax_workarounds.in_thread(
        lambda: self._manager.restore(step, args=ocp.args.Composite(**args))
      )
    except Exception as failure:  # of any class, see `_attempt`
      where = self._states / str(step)
      error = _refusal(where) or failure
    reason = _one_line(error)
    if isinstance(error, PermissionError) or 'PERMISSION_DENIED' in reason:
      raise ValueError(f'{where} may not be read: {reason}')
    raise Damaged(reason)

  def _set_aside(self, step, reason):
    source = self._states / str(step)
    if self._reading:
      console.print_line(f'{source} is damaged ({reason}) and passed over.')
      return
    if multihost.is_first():
      aside = self._workdir / workdir_lib.DAMAGED
      aside.mkdir(exist_ok=True)
      names = (str(step), *(f'{step}-{number}' for number in range(2, 10**6)))
      target = next(aside / n for n in names if not (aside / n).exists())
      source.rename(target)
      console.print_line(
        f'{source} is damaged ({reason}): moved to {target}; the one before it '
        'is taken.'
      )
    self._failed(step, f'damaged: {reason}')
    multihost.all_gather_text('')  # until it is done
    self._manager.reload()


def state_bytes(abstract: state_lib.TrainState) -> int:
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(abstract)
  )


def check_room(workdir: pathlib.Path, abstract: state_lib.TrainState):
  """Raises OSError if the disk of `workdir` has no room for a state."""
  free, need = shutil.disk_usage(workdir).free, state_bytes(abstract)
  if free < need:
    raise OSError(
      f'{workdir} has {free / 2**20:,.0f} MiB free and a checkpoint takes '
      f'{need / 2**20:,.0f}: make room or choose another --workdir'
    )


def _restore_args(abstract):
  """All of a state or, without the optimiser's, the parts that there are."""
  if abstract.opt_state is not None:
    return ocp.args.StandardRestore(abstract)
  item = {n: tree for n, tree in abstract._asdict().items() if tree is not None}
  return ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=True,
  )


def _shapes(tree):
  """Path -> [dtype, shape], in the order of `fingerprint.of`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): [
      leaf.dtype.name,
      [*leaf.shape],
    ]
    for path, leaf in leaves
  }


def _arrays(state):
  digits = checksum.tree_checksums(state)
  return {
    name: [*known, digits[name]] for name, known in _shapes(state).items()
  }


def _digest(record):
  text = json.dumps(record, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _signed(record):
  record = json.loads(json.dumps(files.jsonable(record)))
  return {'record': record, 'sha256': _digest(record)}


def _checked(signed, where):
  try:
    record, digest = signed['record'], signed['sha256']
  except (TypeError, KeyError):
    raise Damaged('its record is not one') from None
  if _digest(record) != digest:
    raise Damaged('its record is not what was written')
  if record['format'] != FORMAT:
    raise ValueError(
      f'{where} is in the format {record["format"]!r}, this version of mhc '
      f'reads {FORMAT!r}: go on with the version that wrote it'
    )
  return record


def _refusal(where):
  """Of a folder that may not be listed: what is in it seems to be missing."""
  errors = []
  for _ in where.walk(on_error=errors.append):
    pass
  return next((e for e in errors if isinstance(e, PermissionError)), None)


def _one_line(error):
  while error.__cause__ is not None:
    error = error.__cause__
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) < 300 else f'{text[:300]}...'
