"""How long the devices of a pipeline idle, by its schedule."""

import collections
from typing import Literal

import numpy as np

from mhc import config
from mhc.pipeline import table
from mhc.pipeline import transfers


def fraction(
  schedule: table.Schedule,
  forward: float = 1.0,
  backward: float = 3.0,
  sync: Literal['lockstep', 'neighbour', 'none'] = 'lockstep',
) -> float:
  """1 - W / D: W is the busiest device's work, D how long the schedule takes.

  Args:
    schedule: to measure; transfers and the head's phase take no time.
    forward: an F's time.
    backward: a B's, with the forward pass that it repeats.
    sync: what a device waits for.
      lockstep: before a tick, for all devices to finish the last one: a tick
        takes as long as the most that a device has to do in it, F plus B. One
        program whose collectives hold all devices together.
      neighbour: before a tick, for the devices beside it to finish the last.
      none: before an operation, for its inputs.
  """
  work = forward * (schedule.table['f_chunk'] >= 0)
  work = work + backward * (schedule.table['b_chunk'] >= 0)
  clock = np.zeros(schedule.num_devices)
  match sync:
    case 'lockstep':
      for row in work:
        clock = clock.max() + row
    case 'neighbour':
      edge = 'wrap' if schedule.placement == 'loop' else 'edge'
      for row in work:
        padded = np.pad(clock, 1, edge)
        clock = np.max([padded[:-2], clock, padded[2:]], axis=0) + row
    case 'none':
      where = transfers.places(
        schedule.placement, schedule.num_devices, schedule.num_chunks
      )
      done = collections.defaultdict(float)
      for _, kind, s, m in sorted(
        (tick, kind, *at)
        for kind, ticks in enumerate(table.ticks_of(schedule))
        for at, tick in np.ndenumerate(ticks)
        if tick >= 0
      ):
        device, _ = where[s]
        start = max(clock[device], done[0, s - 1, m], done[1, s + 1, m])
        clock[device] = start + (backward if kind else forward)
        done[kind, s, m] = clock[device]
  return float(1 - work.sum(axis=0).max() / clock.max())


def of_mesh(mesh: config.MeshConfig, num_microbatches: int) -> float:
  """The bubble of a mesh's pipeline; 0 without one.

  B takes twice as long as F, and a third time where it repeats F.
  """
  if mesh.pipe == 1:
    return 0.0
  backward = 2.0 if mesh.keep == 'stages' else 3.0
  schedule = table.for_mesh(mesh, num_microbatches)
  return fraction(schedule, backward=backward)
