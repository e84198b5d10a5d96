"""Checkpoints of a run: saved in the background, verified when restored.

    checkpoints/STEP/state   parameters, optimiser, biases, in depth order
    checkpoints/STEP/record  format, settings, type, shape and checksum of every
                             array, and the other values that a resumed run
                             needs (the position in the data)
    damaged/STEP             corrupted checkpoints

A state is copied off the devices at once and written in the background, under a
temporary name, or in a bucket without its last file, until it is complete: a
killed process leaves the previous one.
It counts as saved when its record and its first array have been read again.
Processes that train together write it together, each its part of the arrays;
other processes, on another mesh, can resume from it.

A state that is read is compared with its record, bit for bit. A corrupted one
is moved to damaged/ and the previous one is restored; an intact one of another
run raises an error, and so does one that cannot be read for lack of permission.
"""

from collections.abc import Callable, Mapping
import contextlib
import math
import os
import shutil
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mhc import config as config_lib
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.training import checkpoint_record
from mhc.training import orbax_workarounds
from mhc.training import state as state_lib
from mhc.training import workdir as workdir_lib
from mhc.training.checkpoint_record import Corrupted

COMMITTED = 'commit_success.txt'  # by which Orbax ends a state in a bucket


class Saved(NamedTuple):
  """A state in depth order, and the extra values saved with it."""

  state: state_lib.TrainState
  extra: dict[str, Any]


def restore_model(
  workdir: paths.Path, device: jax.Device | None = None
) -> state_lib.TrainState:
  """Restores the newest intact state, without optimiser, to one device.

  It reads a third of the bytes of a state, and builds no step.

  Args:
    workdir: work directory of the run, which is not changed.
    device: by default the first one.

  Raises:
    ValueError: there is no run, no checkpoint yet, or none that is intact.
  """
  config = workdir_lib.read_config(workdir)
  return restore(workdir, state_lib.abstract_model(config.model, device))


def restore(
  workdir: paths.Path, abstract: state_lib.TrainState
) -> state_lib.TrainState:
  """Restores the newest intact state of the run in `workdir`.

  Args:
    workdir: work directory of the run, which is not changed.
    abstract: as for `Checkpoints.restore`.

  Raises:
    ValueError: there is no checkpoint yet, or none that is intact.
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
  """The checkpoints in `workdir`; with `reading`, nothing is changed."""

  def __init__(
    self,
    workdir: paths.Path,
    config: config_lib.Config,
    *,
    reading: bool = False,
    failed: Callable[[int, str], None] = lambda step, reason: None,
  ):
    """`failed` is called with every step that is not saved or corrupted."""
    self._workdir, self._config = paths.absolute(workdir), config
    self._states = self._workdir / workdir_lib.CHECKPOINTS
    self._reading, self._failed = reading, failed
    self._writing: int | None = None
    self._written_record = ''  # digest of the record that is being written
    self._last_save_ok = True
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
    """Returns the steps of the checkpoints, the newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, state: state_lib.TrainState, extra: Mapping[str, Any]):
    """Begins to save a state in depth order under its number of updates.

    A failure is logged and passed to `failed`; the run goes on, and tries again
    at the next save.
    """
    self.wait()
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    record = checkpoint_record.make(self._config, state, extra)
    self._writing, self._written_record = step, record['sha256']
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
    )
    self._attempt(lambda: self._begin(step, args))

  def wait(self) -> bool:
    """Waits until the last state is written; returns whether it was."""
    if self._writing is not None:
      self._attempt(self._written)
    return self._last_save_ok

  def restore(self, abstract: state_lib.TrainState) -> Saved | None:
    """Restores the newest intact state; None if there is no checkpoint.

    Args:
      abstract: an abstract state in depth order, with the shardings to restore
        to; without opt_state the optimiser's is not read.

    Raises:
      ValueError: a checkpoint is intact but of another run or version, one may
        not be read, or all are corrupted.
    """
    self.wait()
    found = self.steps()
    for step in found:
      try:
        return self._read_twice(step, abstract)
      except Corrupted as error:
        self._set_aside(step, str(error))
    if found:
      raise ValueError(
        f'{self._workdir} has no intact checkpoint, see the messages above: '
        'put one back, or start again with another --workdir'
      )
    return None

  def discard(self, step: int):
    """Deletes a checkpoint that led to alerts twice, if older ones exist.

    Both times with other data, so the state itself is suspect. One that has
    newer ones is left to `keep_checkpoints`; the only one is kept.
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
      # Orbax would wait ten minutes for a folder that it cannot create.
      if multihost.is_first() and not paths.in_bucket(self._states):
        os.rmdir(tempfile.mkdtemp(dir=self._states))
    self._manager.save(step, args=args)

  def _written(self):
    with multihost.raise_together():
      try:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
      except Exception as error:  # of any class, see `_attempt`
        raise OSError(_one_line(error)) from error
    self._read_back(self._writing)
    self._writing = None

  def _read_back(self, step):
    """Reads a little of what was written.

    Raises:
      multihost.RunRefused, ValueError: it is not there, or not the same.
    """
    self._manager.reload()
    with multihost.raise_together():
      if step not in self._manager.all_steps():
        raise ValueError(f'{self._states / str(step)} is not found again')
      if multihost.is_first():
        record, number = _read_little(self._states / str(step))
        if record.get('sha256') != self._written_record:
          raise ValueError('its record is not the one that was written')
        if number != step:
          raise ValueError(f'it is read as the state after step {number}')

  def _attempt(self, action):
    step = self._writing
    try:
      action()
      self._last_save_ok = True
    except Exception as error:  # storage and Orbax raise many classes
      self._writing, self._last_save_ok = None, False
      reason = _one_line(error)
      others = {*self._finished()} - {step}
      console.print_line(
        f'NOT SAVED: the state after step {step}: {reason}. Training goes on; '
        f'the last one on disk is {max(others, default="none")}.'
      )
      self._failed(step, reason)
      self._start_over()

  def _start_over(self):
    """Deletes the partial files of a failed save and reopens the manager."""
    if multihost.is_first():
      for leftover in self._states.glob('*tmp*'):
        files.delete_tree(leftover)
    with contextlib.suppress(Exception):  # the same failure, already logged
      self._manager.close()
    self._open()

  def _finished(self):
    found = [p for p in self._states.iterdir() if p.name.isdigit()]
    if paths.in_bucket(self._states):  # where a state has its name at once
      found = [p for p in found if (p / COMMITTED).exists()]
    return [int(p.name) for p in found]

  def _read_twice(self, step, abstract):
    try:
      return self._read(step, abstract)
    except Corrupted:
      # It may have been a transient error of a shared disk.
      return self._read(step, abstract)

  def _read(self, step, abstract):
    where = self._states / str(step)
    if (where / 'data').is_dir() and not (where / 'record').exists():
      raise ValueError(
        f'{where} is of an earlier version of mhc, without a record: go on '
        'with that version, or choose another --workdir'
      )
    args = {'record': ocp.args.JsonRestore()}
    signed = self._load(step, args)['record']
    record = checkpoint_record.verified(signed, where)
    checkpoint_record.check_config(record, self._config, where)
    # Earlier versions named SinglePass.next_mhc `inner`. Their states are read
    # for one release; this and `renamed` go with the next.
    is_old = any('.inner.' in name for name in record['arrays'])
    if is_old:
      abstract = checkpoint_record.renamed(abstract, 'next_mhc', 'inner')
    checkpoint_record.check_shapes(record, abstract, where)
    args = {'state': _restore_args(abstract)}
    loaded = self._load(step, args)['state']
    if not isinstance(loaded, dict):
      loaded = dict(zip(state_lib.TrainState._fields, loaded, strict=True))
    state = abstract._replace(**loaded)
    checkpoint_record.check_sums(record, state)
    if int(state.step) != step:
      raise Corrupted(f'it is the state after step {int(state.step)}')
    if is_old:
      state = checkpoint_record.renamed(state, 'inner', 'next_mhc')
    return Saved(state, record['extra'])

  def _load(self, step, args):
    try:
      return orbax_workarounds.in_thread(
        lambda: self._manager.restore(step, args=ocp.args.Composite(**args))
      )
    except Exception as failure:  # of any class, see `_attempt`
      where = self._states / str(step)
      error = _permission_error(where) or failure
    reason = _one_line(error)
    if isinstance(error, PermissionError) or 'PERMISSION_DENIED' in reason:
      raise ValueError(f'{where} may not be read: {reason}')
    raise Corrupted(reason)

  def _set_aside(self, step, reason):
    source = self._states / str(step)
    if self._reading:
      console.print_line(f'{source} is damaged ({reason}) and passed over.')
      return
    if multihost.is_first():
      aside = self._workdir / workdir_lib.DAMAGED
      if not paths.in_bucket(aside):
        aside.mkdir(exist_ok=True)
      names = (str(step), *(f'{step}-{number}' for number in range(2, 10**6)))
      target = next(aside / n for n in names if not (aside / n).exists())
      files.move(source, target)
      console.print_line(
        f'{source} is damaged ({reason}): moved to {target}; the previous one '
        'is restored.'
      )
    self._failed(step, f'damaged: {reason}')
    multihost.all_gather_text('')  # a barrier: it has been moved
    self._manager.reload()


def state_bytes(abstract: state_lib.TrainState) -> int:
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(abstract)
  )


def check_room(workdir: paths.Path, abstract: state_lib.TrainState):
  """Raises OSError if the disk of `workdir` has no room for a state."""
  if paths.in_bucket(workdir):
    return  # which has no end
  free, need = shutil.disk_usage(workdir).free, state_bytes(abstract)
  if free < need:
    raise OSError(
      f'{workdir} has {free / 2**20:,.0f} MiB free and a checkpoint takes '
      f'{need / 2**20:,.0f}: make room or choose another --workdir'
    )


def _read_little(where: paths.Path) -> tuple[dict[str, Any], int]:
  """The record of a state and its first array, read by this process alone."""
  me = multihost.index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix='alone'
  )
  of_json = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
  of_arrays = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
  args = ocp.args.PyTreeRestore(
    item={'step': np.zeros((), np.int32)},
    restore_args={'step': ocp.RestoreArgs(restore_type=np.ndarray)},
    partial_restore=True,
  )

  def read(handler, name, args):
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
      return reader.restore(where / name, args=args)

  def both():
    record = read(of_json, 'record', ocp.args.JsonRestore())
    return record, int(read(of_arrays, 'state', args)['step'])

  return orbax_workarounds.in_thread(both)


def _restore_args(abstract):
  """Arguments for a whole state or, without opt_state, its other fields."""
  if abstract.opt_state is not None:
    return ocp.args.StandardRestore(abstract)
  item = {n: tree for n, tree in abstract._asdict().items() if tree is not None}
  return ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=True,
  )


def _permission_error(where):
  """Returns that of a folder that may not be listed, and so seems empty."""
  errors = []
  for _ in where.walk(on_error=errors.append):
    pass
  return next((e for e in errors if isinstance(e, PermissionError)), None)


def _one_line(error):
  while error.__cause__ is not None:
    error = error.__cause__
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) < 300 else f'{text[:300]}...'
