"""Runs settings for one step, each program once, in a process with limits."""

from collections.abc import Callable
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import resource
import time
from typing import Any, Literal

import jax
import numpy as np
import settings_strategies as strategies

from mhc import config as config_lib
from mhc.config import dicts
from mhc.data import batches as batches_lib
from mhc.data import mixture as mixture_lib
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.parallel.placement import Placement
from mhc.training import checkpoint
from mhc.training import step

# CPU seconds that a case may take.
SECONDS = 60
# Bytes that a case may take by formula, and a process in total.
ROOM, LIMIT = 2**29, 10 * 2**30
# Settings that compiled programs do not depend on.
OUTSIDE = {
  'seed': 0,
  'eval_every': 0,
  'probe_every': 0,
  'checkpoint_every': 0,
  'keep_every': 0,
  'keep_checkpoints': 1,
  'eval_sequences': 1,
  'tensorboard': False,
  'wandb': '',
  'watchdog_s': 0.0,
  'data.path': '',
  'data.on_damage': 'stop',
  'mesh.overlap': True,
}
Work = Literal['check', 'build', 'all']
# An outcome and a message.
Check = Callable[[strategies.Case, 'Runner'], tuple[str, str]]


def nested(settings: dict[str, Any]) -> dict[str, Any]:
  """Turns dotted names into nested groups."""
  tree = {}
  for name, value in settings.items():
    *path, last = name.split('.')
    place = tree
    for part in path:
      place = place.setdefault(part, {})
      if not isinstance(place, dict):
        raise ValueError(f'{name}={value!r} is not a setting')
    place[last] = value
  return tree


def programs_of(config: config_lib.Config, num_devices: int) -> tuple:
  """Two keys: equal for the same gradients, and for the same updates."""
  model, unused = config.model, []
  if config.mesh.pipe == 1:
    unused += ['mesh.chunks', 'mesh.schedule', 'mesh.head']
  kind = model.connection.kind
  if kind == 'mhc_lite' or not kind.startswith('mhc'):
    unused += [
      f'model.connection.sinkhorn_{name}'
      for name in ('iters', 'eps', 'backward')
    ]
  if not model.moe.num_experts:
    unused += [f'model.moe.{name}' for name in dicts.leaves(model.moe)]
  if model.moe.dispatch == 'dropless':
    unused.append('model.moe.capacity_factor')
  if config.mesh.expert == 1:
    unused += ['model.moe.transport', 'model.moe.buffer_factor']
  if model.moe.router != 'bias':
    unused.append('model.moe.bias_speed')
  if model.recompute == 'none':
    unused.append('model.recompute_every')
  usual = dicts.leaves(config_lib.Config())
  changes = OUTSIDE | {name: usual[name] for name in unused}
  changes |= {'mesh.num_devices': num_devices, 'num_steps': 40}
  changes['optimizer'] = dicts.to_dict(config_lib.OptimizerConfig())
  changes['guards'] = dicts.to_dict(config_lib.GuardsConfig())
  if model.connection.implementation == 'auto':
    changes['model.connection.implementation'] = 'xla'
  guards = config_lib.GuardsConfig(
    nonfinite=config.guards.nonfinite,
    loss_spike=config.guards.loss_spike,
    rollback_rate=0.5 if config.guards.rollback_rate < 1 else 1.0,
  )
  return (
    (dicts.replace(config, **nested(changes)), config.optimizer.name),
    (config.optimizer, config.num_steps, guards),
  )


class Runner:
  """Runs configs, each program once.

  Attributes:
    work: 'check' does what `run.train` does before any work, 'build' everything
      before a compilation, 'all' everything.
  """

  def __init__(self, work: Work = 'all'):
    self.work, self._done, self._compiled = work, set(), 0

  def __call__(self, config: config_lib.Config) -> str:
    """Makes one step as `run.train` does; returns the outcome."""
    mixture, vocab_size = mixture_lib.load(config), config.model.vocab_size
    batches = batches_lib.train_batches(
      mixture, config.data, config.seed, vocab_size
    )
    heldout, _ = batches_lib.heldout_rows(
      mixture, config.data, config.eval_sequences, vocab_size
    )
    mesh = mesh_lib.make_mesh(config.mesh, config.data)
    Placement(config, mesh)
    memory.check(config, mesh)
    next(batches)
    jax.random.key(config.seed)
    if self.work == 'check':
      return 'built'
    keys = gradients, updates = programs_of(config, mesh.size)
    if gradients in self._done:
      if updates in self._done:
        return 'ran before'
      # The update does not depend on the model.
      tiny = dicts.from_dict(config_lib.Config, nested(strategies.TINY))
      config = dataclasses.replace(
        tiny,
        num_steps=config.num_steps,
        optimizer=config.optimizer,
        guards=config.guards,
      )
      mesh = mesh_lib.make_mesh(config.mesh, config.data)
    programs = step.build(config)
    if self._is_large(config, programs):
      return 'not tried'
    if self.work == 'build':
      return 'built'
    self._compiled += 1
    if self._compiled % 20 == 0:
      step._build.cache_clear()
      jax.clear_caches()
    self._step(config, mixture, heldout, programs)
    self._done.update(keys)  # not if it failed: it would fail again
    return 'ran'

  def _step(self, config, mixture, heldout, programs):
    batch = next(
      batches_lib.train_batches(mixture, config.data, config.seed, 320)
    )
    with jax.transfer_guard('allow'):
      tokens = partition.put(batch, programs.mesh, partition.BATCH)
      state = programs.init(config.seed)
      jax.eval_shape(programs.token_losses, state, tokens)
      row = partition.put(heldout[:1, :-1], programs.mesh, partition.REPLICATED)
      jax.eval_shape(programs.probe, state, row)
      state, metrics = programs.train(state, tokens, programs.inputs())
      loss = float(metrics['loss/train'])
    assert np.isfinite(loss), f'the first loss is {loss}'
    rates = [
      config.optimizer.learning_rate,
      config.optimizer.weight_decay,
      config.model.moe.balance_loss,
      *config.optimizer.decay_factors,
    ]
    if max(rates) > 1e6:  # the update may well be beyond float32
      return
    for name, value in metrics.items():
      assert np.isfinite(value), f'{name} is {value}'
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
      name = jax.tree_util.keystr(path)
      assert np.isfinite(leaf).all(), f'{name} is not finite after a step'

  def _is_large(self, config, programs) -> bool:
    size = programs.mesh.size
    kept = sum(memory.predicted(config, size).values())
    state = checkpoint.state_bytes(programs.abstract_state)
    slow = (
      config.data.seq_len > 4096,
      config.data.batch_size > 4096,
      config.model.connection.num_streams > 16,
      config.model.connection.sinkhorn_iters > 100,
    )
    return kept * size + 3 * state > ROOM or any(slow)


class Child:
  """A process that checks case after case, replaced when it ends."""

  def __init__(self, check: Check, scratch: pathlib.Path):
    self._check, self._errors = check, scratch / 'stderr'
    self._process = None

  def __call__(self, case: strategies.Case, work: Work) -> tuple[str, str]:
    """Returns the result of `check`, or 'failed' for a crash or a timeout."""
    if self._process is None:
      self._start()
    try:
      self._pipe.send((case, work))
      # The child counts its own CPU time; the machine may be busy.
      if self._pipe.poll(5 * SECONDS):
        result, took = self._pipe.recv()
        slow = 'failed', f'took {took:.0f} s'
        return slow if took > SECONDS else result
    except (EOFError, OSError):
      pass
    status = self.close()
    said = self._errors.read_text(errors='replace')[-1500:]
    return 'failed', f'exit status {status}: {said}'

  def _start(self):
    self._errors.write_text('')
    spawn = multiprocessing.get_context('spawn')
    self._pipe, end = spawn.Pipe()
    self._process = spawn.Process(
      target=_serve, args=(end, self._check, self._errors), daemon=True
    )
    self._process.start()
    end.close()  # so that the pipe ends with the child

  def close(self) -> int | None:
    """Ends the process; returns its exit status."""
    if self._process is None:
      return None
    self._pipe.close()
    self._process.join(1)
    self._process.kill()
    self._process.join()
    process, self._process = self._process, None
    return process.exitcode


def _serve(pipe, check, errors):
  file = os.open(errors, os.O_WRONLY)
  os.dup2(file, 1)
  os.dup2(file, 2)
  resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
  runner = Runner()
  with contextlib.suppress(EOFError):
    while True:
      case, runner.work = pipe.recv()
      begun = time.process_time()
      result = check(case, runner)
      pipe.send((result, time.process_time() - begun))
