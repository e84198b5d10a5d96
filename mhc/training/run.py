"""One run in one folder (`workdir`), from its last checkpoint to its summary.

With many processes (`multihost`) each does all of this, and the first one
writes the files; the folder must be one that all of them see.
"""

import json
import pathlib

import jax

from mhc import config as config_lib
from mhc.config import dicts
from mhc.data import batches as batches_lib
from mhc.model import recompute
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import multihost
from mhc.runtime import preemption
from mhc.training import checkpoint
from mhc.training import loop
from mhc.training import step as step_lib
from mhc.training import workdir as workdir_lib


def train(
  config: config_lib.Config,
  workdir: pathlib.Path,
  label: str = 'train',
  deadline: float | None = None,
) -> dict:
  """Runs `config` to its end and returns its summary.

  A finished run is returned as it is. An interrupted one goes on from its
  newest checkpoint, with the losses that it would have had, on whatever mesh
  and in however many processes.

  Raises:
    ValueError, OSError: unusable settings, data or folder, before any work.
    processes.Stopped: the run was told to end, or `deadline` (of
      `time.monotonic`) has passed; it is saved.
    guards.Stop: a guard ended it.
  """
  first = multihost.is_first()
  with multihost.raise_together():
    corpus, vocab_size = batches_lib.load_for(config), config.model.vocab_size
    batches = batches_lib.train_batches(
      corpus, config.data, config.seed, vocab_size
    )
    heldout = batches_lib.heldout_rows(
      corpus, config.data.seq_len, config.eval_sequences, vocab_size
    )
    mesh = mesh_lib.make_mesh(config.mesh, config.data)
    Placement(config, mesh)  # checks that the devices can do it
    memory.check(config, mesh)
  multihost.assert_same(
    {'the text': corpus.sha256, 'jax': jax.__version__, **dicts.leaves(config)}
  )
  with multihost.raise_together():
    if first:
      _claim(workdir, config, corpus)
  with multihost.raise_together():
    if not (workdir / workdir_lib.CONFIG).exists():
      raise ValueError(
        f'{workdir} is not the folder that process 0 writes to: all processes '
        'must see the same --workdir'
      )
    summary = workdir_lib.read_summary(workdir) if first else None
  summary = multihost.broadcast_from_first(summary)
  if summary is not None:
    return summary

  step = step_lib.build(config)
  with multihost.raise_together():
    if first:
      checkpoint.check_room(workdir, step.saved_state)
  # Compiles the update, which all do at the same time.
  line = _memory_line(config, step)
  if first:
    console.print_line(line)
  with (
    preemption.StopSignal(deadline) as asked,
    loop.Loop(
      config, workdir, step, batches, heldout, corpus, label
    ) as running,
  ):
    values = running.run(asked)

  summary = {
    'num_params': sum(
      leaf.size for leaf in jax.tree.leaves(step.saved_state.params)
    ),
    'predicted_activation_bytes': sum(
      memory.predicted(config, step.mesh.size).values()
    ),
    'temp_bytes': step.memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_bytes(step.memory),
    'heldout_nats': values['loss/heldout'],
    'heldout_bits_per_byte': values['loss/heldout_bits_per_byte'],
    'tokens': config.num_steps * config.tokens_per_step,
    'epochs': config.num_steps
    * config.tokens_per_step
    / corpus.num_train_tokens,
    'corpus': corpus.summary(),
    'num_devices': step.mesh.size,
    'num_processes': multihost.count(),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  with multihost.raise_together():
    if first:
      text = json.dumps(files.jsonable(summary), indent=2) + '\n'
      files.replace(workdir / workdir_lib.SUMMARY, text)
  return summary


def _claim(workdir, config, corpus):
  """Makes the folder this run's."""
  workdir_lib.initialize(workdir, config)
  if corpus.tokenizer is not None and corpus.tokenizer.name != 'bytes':
    # So that the run can be sampled where its data are not.
    files.replace(workdir / workdir_lib.TOKENIZER, corpus.tokenizer.description)


def _memory_line(config, step):
  """What the recompute policy is predicted to keep, beside XLA's own count."""
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
