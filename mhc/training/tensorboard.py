"""A copy of a run's scalars for TensorBoard, which never holds up the run.

Written in the training thread: a writer's thread that a full disk has ended
would leave a queue that nobody empties.
"""

from collections.abc import Mapping
import contextlib
import os
import socket
import time

from mhc.runtime import console
from mhc.runtime import paths
from mhc.runtime import shadow

FLUSH_S = 2.0


class TensorBoard:
  """Event files in `folder`, a new one for each start and after each error."""

  def __init__(self, folder: paths.Path, last_step: int):
    """Scalars of steps after `last_step`, of an earlier start, are purged."""
    self._path, self._next = folder, last_step + 1
    self._folder = shadow.of_folder(folder)
    self._writer = None
    self._waiting: list[tuple[float, int, Mapping[str, float]]] = []
    self._flushed, self._reported = 0.0, False

  def write(self, step: int, values: Mapping[str, float]):
    """Adds scalars; on a full disk, as soon as there is room again."""
    self._waiting.append((time.time(), step, values))
    if time.monotonic() - self._flushed >= FLUSH_S:
      self.flush()

  def flush(self):
    self._flushed = time.monotonic()
    if not self._waiting:
      return
    try:
      if self._writer is None:
        self._open()
      self._write_waiting()
    except OSError as error:
      self._drop()
      if not self._reported:
        console.print_line(
          f'NOT WRITTEN: {self._folder}: {error}. Its scalars wait for room.'
        )
      self._reported = True
      return
    self._next, self._waiting = self._waiting[-1][1] + 1, []
    self._reported = False

  def save(self):
    """Brings what has been written to the disk, or to the bucket."""
    self.flush()
    shadow.upload(self._path)

  def close(self):
    self.flush()
    if self._waiting:
      console.print_line(f'NOT WRITTEN: the last scalars of {self._folder}')
    self._drop()
    shadow.upload(self._path)

  def _open(self):
    # Imported here: off by default, and slow.
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter

    self._folder.mkdir(exist_ok=True)
    name = f'{time.time_ns():020}.{socket.gethostname()}.{os.getpid()}'
    file = self._folder / f'events.out.tfevents.{name}'
    self._writer = RecordWriter(str(file))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    for event in (
      event_pb2.Event(step=self._next, file_version='brain.Event:2'),
      event_pb2.Event(step=self._next, session_log=start),
    ):
      self._writer.write(event.SerializeToString())

  def _write_waiting(self):
    from tensorboardX.proto import event_pb2
    from tensorboardX.proto.summary_pb2 import Summary

    for seconds, step, values in self._waiting:
      scalars = [
        Summary.Value(tag=name, simple_value=value)
        for name, value in values.items()
      ]
      event = event_pb2.Event(
        wall_time=seconds, step=step, summary=Summary(value=scalars)
      )
      self._writer.write(event.SerializeToString())
    self._writer.flush()

  def _drop(self):
    if self._writer is not None:
      with contextlib.suppress(OSError, ValueError):
        self._writer.close()
    self._writer = None
