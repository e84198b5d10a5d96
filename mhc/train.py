"""The training loop: one run in one folder, from its last checkpoint on.

The folder's files, beside those of `checkpoint`:

    metrics.jsonl    a line a step: loss, gradient norm, rate, time; held-out
                     loss where it was measured
    probes.jsonl     gains and mean matrices of H_res on one held-out row
    summary.json     written last: what the run was and how it ended
    tokenizer.json   the vocabulary, if it is not bytes

Of many processes (`processes`) each runs this loop, and the first one writes
these files; the folder must be one that all of them see.
"""

import contextlib
import json
import pathlib
import time

import jax

from mhc import checkpoint
from mhc import config as config_lib
from mhc import data
from mhc import evaluate
from mhc import memory
from mhc import plain
from mhc import processes
from mhc import recompute
from mhc import sharding
from mhc import step as step_lib
from mhc import writer


def train(
  config: config_lib.Config, workdir: pathlib.Path, label: str = 'train'
) -> dict:
  """Runs `config` to its end and returns its summary.

  A finished run is returned as it is. An interrupted one goes on from its
  newest checkpoint, with the losses that it would have had, on whatever mesh
  and in however many processes.

  Raises:
    ValueError, OSError: unusable settings, data or folder, before any work.
    processes.Stopped: one of the processes was told to end; the run is saved.
  """
  first = processes.is_first()
  with processes.together():
    corpus = data.load(config.data.path)
    data.check_vocabulary(corpus, config.model.vocab_size)
    batches = data.train_batches(corpus, config.data, config.seed)
    heldout = data.heldout_rows(
      corpus, config.data.seq_len, config.eval_sequences
    )
    mesh = sharding.make_mesh(config.mesh, config.data)
    step_lib.check(config, mesh)
  processes.check_same(
    {'the text': corpus.sha256, 'jax': jax.__version__, **plain.leaves(config)}
  )
  with processes.together():
    if first:
      _claim(workdir, config, corpus)
  with processes.together():
    if not (workdir / 'config.json').exists():
      raise ValueError(
        f'{workdir} is not the folder that process 0 writes to: all processes '
        'must see the same --workdir'
      )
    summary = read_summary(workdir) if first else None
  summary = processes.from_first(summary)
  if summary is not None:
    return summary

  programs = step_lib.build(config)
  # Compiles the update, which all do at the same time.
  line = _memory_line(config, programs)
  if first:
    writer.note(line)
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      checkpoint.Checkpoints(workdir, config.keep_checkpoints)
    )
    state = checkpoints.restore(programs.functions.canonical_state, batches)
    if state is None:
      state = programs.init(config.seed)
    else:
      state = programs.place(state)
    start = int(state.step)
    writers, probes = [], []
    if first:
      writers.append(writer.JsonLines(workdir / 'metrics.jsonl', start))
      probes.append(writer.JsonLines(workdir / 'probes.jsonl', start))
      if config.tensorboard:
        writers.append(writer.TensorBoard(workdir))
    for resource in (*writers, *probes):
      stack.callback(resource.close)
    bar = stack.enter_context(
      writer.progress_bar(config.num_steps, start, label, shown=first)
    )

    def record(step, metrics):
      for sink in writers:
        sink.write(step, metrics)
      bar.update()
      bar.set_postfix_str(
        f'loss {metrics["loss/train"]:.3f}, '
        f'{metrics["time/tokens_per_s"]:,.0f} tokens/s',
        refresh=False,
      )

    def fetch(metrics, since):
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      values['time/step_s'] = time.perf_counter() - since
      values['time/tokens_per_s'] = (
        config.tokens_per_step / values['time/step_s']
      )
      return values

    def due(every, step):
      return step == config.num_steps or (every and step % every == 0)

    # A step's numbers are fetched after the next step has been dispatched, so
    # that the device does not wait for the host.
    pending, clock = None, time.perf_counter()
    for step in range(start + 1, config.num_steps + 1):
      tokens = sharding.place(next(batches), programs.mesh, sharding.BATCH)
      with jax.transfer_guard('disallow'):
        state, metrics = programs.train_step(state, tokens)
      if pending is not None:
        values = fetch(pending, clock)
        clock = time.perf_counter()
        record(step - 1, values)
      pending = metrics

      evaluating = due(config.eval_every, step)
      probing = due(config.probe_every, step)
      stopping = processes.stopping(step) and step < config.num_steps
      saving = stopping or due(config.checkpoint_every, step)
      if not (evaluating or probing or saving):
        continue
      values = fetch(pending, clock)
      if evaluating:
        values |= evaluate.evaluate(
          programs, state, heldout, config.data.batch_size, corpus.tokenizer
        )
      if probing:
        row = sharding.place(heldout[:1, :-1], programs.mesh, sharding.WHOLE)
        profile = jax.device_get(programs.probe(state, row))
        for sink in probes:
          sink.write(step, profile)
        values['mhc/gain_fwd_max'] = float(profile['composite_fwd'].max())
        values['mhc/gain_bwd_max'] = float(profile['composite_bwd'].max())
      record(step, values)
      if saving:
        checkpoints.save(programs.canonical(state), batches)
      if stopping:
        raise processes.Stopped(f'saved after step {step}')
      pending, clock = None, time.perf_counter()

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
    'num_processes': processes.count(),
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  with processes.together():
    if first:
      text = json.dumps(writer.jsonable(summary), indent=2) + '\n'
      writer.replace(workdir / 'summary.json', text)
  return summary


def _claim(workdir, config, corpus):
  """Makes the folder this run's."""
  checkpoint.claim(workdir, config)
  if corpus.tokenizer is not None and corpus.tokenizer.name != 'bytes':
    # So that the run can be sampled where its data are not.
    writer.replace(workdir / 'tokenizer.json', corpus.tokenizer.description)


def _memory_line(config, programs):
  """What the recompute policy is predicted to keep, beside XLA's own count."""
  predicted = memory.predicted(config, programs.mesh.size)
  parts = ', '.join(f'{k} {v / 2**20:.1f}' for k, v in predicted.items())
  every = recompute.interval(config.model)
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
