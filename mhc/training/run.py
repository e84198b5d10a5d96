"""One run in one folder, from its last checkpoint to its summary.

    summary.json     written last: what the run was and how it ended
    tokenizer.json   the vocabulary, if it is not bytes

Its files beside those of `folder`, `checkpoint` and `loop`. Of many processes
(`processes`) each does all of this, and the first one writes the files; the
folder must be one that all of them see.
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
  with multihost.together():
    corpus, vocab_size = batches_lib.load_for(config), config.model.vocab_size
    batches = batches_lib.train_batches(
      corpus, config.data, config.seed, vocab_size
    )
    heldout = batches_lib.heldout_rows(
      corpus, config.data.seq_len, config.eval_sequences, vocab_size
    )
    mesh = mesh_lib.make_mesh(config.mesh, config.data)
    step_lib.check(config, mesh)
    memory.check(config, mesh)
  multihost.check_same(
    {'the text': corpus.sha256, 'jax': jax.__version__, **dicts.leaves(config)}
  )
  with multihost.together():
    if first:
      _claim(workdir, config, corpus)
  with multihost.together():
    if not (workdir / 'config.json').exists():
      raise ValueError(
        f'{workdir} is not the folder that process 0 writes to: all processes '
        'must see the same --workdir'
      )
    summary = read_summary(workdir) if first else None
  summary = multihost.from_first(summary)
  if summary is not None:
    return summary

  programs = step_lib.build(config)
  with multihost.together():
    if first:
      checkpoint.check_room(workdir, programs.functions.canonical_state)
  # Compiles the update, which all do at the same time.
  line = _memory_line(config, programs)
  if first:
    files.note(line)
  with (
    preemption.Interrupts(deadline) as asked,
    loop.Loop(
      config, workdir, programs, batches, heldout, corpus, label
    ) as running,
  ):
    values = running.run(asked)

  summary = {
    'num_params': sum(
      leaf.size
      for leaf in jax.tree.leaves(programs.functions.canonical_state.params)
    ),
    'predicted_activation_bytes': sum(
      memory.predicted(config, programs.mesh.size).values()
    ),
    'temp_bytes': programs.memory.temp_size_in_bytes,
    'peak_bytes': memory.peak_bytes(programs.memory),
    'heldout_nats': values['loss/heldout'],
    'heldout_bits_per_byte': values['loss/heldout_bits_per_byte'],
    'tokens': config.num_steps * config.tokens_per_step,
    'epochs': config.num_steps
    * config.tokens_per_step
    / corpus.num_train_tokens,
    'corpus': corpus.summary(),
    'num_devices': programs.mesh.size,
    'num_processes': multihost.count(),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  with multihost.together():
    if first:
      text = json.dumps(files.jsonable(summary), indent=2) + '\n'
      files.replace(workdir / 'summary.json', text)
  return summary


def _claim(workdir, config, corpus):
  """Makes the folder this run's."""
  workdir_lib.claim(workdir, config)
  if corpus.tokenizer is not None and corpus.tokenizer.name != 'bytes':
    # So that the run can be sampled where its data are not.
    files.replace(workdir / 'tokenizer.json', corpus.tokenizer.description)


def _memory_line(config, programs):
  """What the recompute policy is predicted to keep, beside XLA's own count."""
  predicted = memory.predicted(config, programs.mesh.size)
  parts = ', '.join(f'{k} {v / 2**20:.1f}' for k, v in predicted.items())
  every = recompute.recompute_interval(config.model)
  return (
    f'recompute={config.model.recompute}, streams kept every {every} '
    f'sub-layers; a device holds, in MiB: activations '
    f'{sum(predicted.values()) / 2**20:.1f} by formula ({parts}), temporaries '
    f'{programs.memory.temp_size_in_bytes / 2**20:.1f} by XLA, peak '
    f'{memory.peak_bytes(programs.memory) / 2**20:.1f}'
  )


def read_summary(workdir: pathlib.Path) -> dict | None:
  """The summary of a finished run, None for an unfinished one."""
  file = workdir / 'summary.json'
  return json.loads(file.read_text()) if file.exists() else None
