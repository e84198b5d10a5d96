"""One run in one work directory, from its last checkpoint to its summary.

With several processes (`multihost`) each does all of this, and the first one
writes the files; all of them must see the same work directory.
"""

import contextlib
import json
from typing import NamedTuple

import grain
import jax

from mhc import config as config_lib
from mhc.config import dicts
from mhc.data import batches as batches_lib
from mhc.data import mixture as mixture_lib
from mhc.model import recompute
from mhc.parallel import counts
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.parallel.placement import Placement
from mhc.runtime import accelerators
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import leases
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.runtime import phases
from mhc.runtime import preemption
from mhc.runtime import signals
from mhc.runtime import source
from mhc.runtime import watchdog
from mhc.training import checkpoint
from mhc.training import loop
from mhc.training import profile
from mhc.training import start
from mhc.training import step as step_lib
from mhc.training import text
from mhc.training import timeline
from mhc.training import vocabulary
from mhc.training import wandb
from mhc.training import workdir as workdir_lib

COMPILING = 'compiling the step'
PATIENT = frozenset({COMPILING})  # what may take an hour


class Data(NamedTuple):
  """What a run reads: batches to train on, rows to evaluate on."""

  mixture: mixture_lib.Mixture
  batches: grain.DatasetIterator
  heldout: batches_lib.Heldout


def train(
  config: config_lib.Config,
  workdir: paths.Path,
  label: str | None = 'train',
  deadline: float | None = None,
  profiled: profile.Steps | None = None,
) -> dict:
  """Runs `config` to its end and returns its summary.

  A finished run returns its summary at once. An interrupted one resumes from
  its newest checkpoint, with the losses that it would have had, on any mesh and
  any number of processes, unless experts have a capacity or the Sinkhorn router
  (`mesh.groups_line`).

  `label` stands before its progress bar, None for none; `profiled` are the
  steps of a profile.

  Raises:
    ValueError, OSError: unusable settings, data or work directory, before any
      work.
    multihost.RunStopped: the run received a signal, or `deadline` (of
      `time.monotonic`) has passed; it is saved.
    guards.Stop: a guard stopped it.
    signals.Ended: a signal came before there was anything to save.
  """
  signals.check()
  timeline.begin()
  if config.wandb:
    wandb.check()
  with phases.phase('reading the data'):
    data = _prepare(config)
  with _alone(workdir, config), watchdog.Watchdog(config.watchdog_s, PATIENT):
    return _train(config, workdir, data, label, deadline, profiled)


def _train(config, workdir, data, label, deadline, profiled) -> dict:
  """`train` by the only process, or group of them, in the folder."""
  summary = _claim(config, workdir, data.mixture)
  if summary is not None:
    return summary
  if label is not None and multihost.is_first():
    tokens = config.num_steps * config.tokens_per_step
    for line in data.mixture.lines():
      console.print_line(line)
    mesh = mesh_lib.make_mesh(config.mesh, config.data)
    if line := mesh_lib.groups_line(config, mesh):
      console.print_line(line)
    if line := mixture_lib.epochs_line(data.mixture, tokens):
      console.print_line(line)
  with phases.phase(COMPILING):
    step = _compile(config, workdir, shown=label is not None)
  with (
    preemption.StopSignal(deadline) as stop_signal,
    loop.Loop(
      config,
      workdir,
      step,
      data.batches,
      data.heldout,
      data.mixture,
      label,
      profiled,
    ) as running,
  ):
    values = running.run(stop_signal)
  summary = _summarise(config, step, data, values)
  summary['goodput'] = timeline.goodput(workdir)
  with multihost.raise_together():
    if multihost.is_first():
      line = json.dumps(files.jsonable(summary), indent=2) + '\n'
      files.replace(workdir / workdir_lib.SUMMARY, line)
  return summary


@contextlib.contextmanager
def _alone(workdir, config):
  """Holds the run, so that no other start trains in the same folder."""
  lease = None
  with multihost.raise_together():
    if multihost.is_first():
      workdir_lib.check(workdir, config)
      lease = leases.take_when_free(workdir / workdir_lib.LOCK, 'run')
  with lease or contextlib.nullcontext():
    yield


def _prepare(config) -> Data:
  """Opens the data and checks that the devices can run `config`."""
  with multihost.raise_together():
    mixture, vocab_size = mixture_lib.load(config), config.model.vocab_size
    mesh = mesh_lib.make_mesh(config.mesh, config.data)
    batches = batches_lib.train_batches(
      mixture,
      config.data,
      config.data_order,
      vocab_size,
      partition.rows_here(config.data.batch_size, mesh),
    )
    heldout = batches_lib.heldout_for(config, mixture)
    Placement(config, mesh)  # checks that the devices can run it
    start.check(config)
    memory.check(config, mesh)
  if multihost.is_first():
    accelerators.tell_if_unused(mesh.devices.flat[0].platform)
  multihost.assert_same(
    {'the text': mixture.sha256, 'jax': jax.__version__, **dicts.leaves(config)}
  )
  return Data(mixture, batches, heldout)


def _claim(config, workdir, mixture) -> dict | None:
  """Initialises the work directory; returns the summary of a finished run."""
  first = multihost.is_first()
  with multihost.raise_together():
    if first:
      workdir_lib.initialize(workdir, config)
      vocabulary.keep(workdir, mixture.tokenizer)
  with multihost.raise_together():
    if not (workdir / workdir_lib.CONFIG).exists():
      raise ValueError(
        f'{workdir} is not the folder that process 0 writes to: all processes '
        'must see the same --workdir'
      )
    summary = workdir_lib.read_summary(workdir) if first else None
    if first and summary is None:
      text.keep(workdir, mixture)
  return multihost.broadcast_from_first(summary)


def _compile(config, workdir, *, shown) -> step_lib.Step:
  """Compiles the update, and logs its memory."""
  step = step_lib.build(config)
  with multihost.raise_together():
    if multihost.is_first():
      checkpoint.check_room(workdir, step.saved_state)
  line = _memory_line(config, step)  # compiles, in all processes at a time
  if shown and multihost.is_first():
    console.print_line(line)
  return step


def _summarise(config, step, data, values) -> dict:
  mixture, tokens = data.mixture, config.num_steps * config.tokens_per_step
  # Each process has read its own rows.
  met = multihost.all_gather_text('\n'.join(mixture.skipped()))
  blocks = {name for text in met for name in text.splitlines()}
  counted = counts.count(config.model, config.data.seq_len)
  return {
    'num_params': counted['total_params'],
    'predicted_activation_bytes': sum(
      memory.predicted(config, step.mesh.size).values()
    ),
    'temp_bytes': step.memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_bytes(step.memory),
    'heldout_nats': values['loss/heldout'],
    'heldout_bits_per_byte': values['loss/heldout_bits_per_byte'],
    'heldout_rows': len(data.heldout.final),
    'flops_per_token': counted['flops_per_token'],
    'tokens': tokens,
    'epochs': tokens / mixture.num_train_tokens,
    'corpus': mixture.summary(tokens, blocks),
    'num_devices': step.mesh.size,
    'num_processes': multihost.count(),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'commit': source.commit(),
  }


def _memory_line(config, step):
  """Memory of a device: predicted activations, and XLA's own count."""
  predicted = memory.predicted(config, step.mesh.size)
  parts = ', '.join(f'{k} {v / 2**20:.1f}' for k, v in predicted.items())
  every = recompute.recompute_interval(config.model)
  return (
    f'recompute={config.model.recompute}, streams kept every {every} '
    f'sub-layers; a device holds, in MiB: activations '
    f'{sum(predicted.values()) / 2**20:.1f} by formula ({parts}), temporaries '
    f'{step.memory.temp_size_in_bytes / 2**20:.1f} by XLA, peak '
    f'{memory.peak_bytes(step.memory) / 2**20:.1f}'
  )
