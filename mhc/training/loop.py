"""The training loop: steps, metrics, probes, guards, checkpoints.

A step's metrics are fetched after the next step has been dispatched, so that
the device does not wait for the host; before it, if something is due after the
step (evaluation, a probe, a checkpoint). The decisions of guards depend on
neither, see `guards`.
"""

import math
import time
from typing import Any, NamedTuple

import jax

from mhc import config as config_lib
from mhc.data import batches as batches_lib
from mhc.data import mixture as mixture_lib
from mhc.parallel import counts
from mhc.parallel import partition
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import machine
from mhc.runtime import multihost
from mhc.runtime import paths
from mhc.runtime import phases
from mhc.runtime import preemption
from mhc.training import checkpoint
from mhc.training import evaluate
from mhc.training import guards as guards_lib
from mhc.training import profile
from mhc.training import records
from mhc.training import start
from mhc.training import step as step_lib
from mhc.training import timeline
from mhc.training import workdir as workdir_lib

SAVING = 'saving'
DUE = ('eval_every', 'probe_every', 'checkpoint_every')


class Pending(NamedTuple):
  """A step that was dispatched and whose metrics were not fetched."""

  step: int
  limit: float  # the loss above which it is a spike
  data_wait_s: float  # for its batch
  position: dict[str, Any]  # in the data, after its batch
  metrics: dict[str, jax.Array]


class Loop:
  """One run, from its newest checkpoint to its end."""

  def __init__(
    self,
    config: config_lib.Config,
    workdir: paths.Path,
    step: step_lib.Step,
    batches,
    heldout: batches_lib.Heldout,
    mixture: mixture_lib.Mixture,
    label: str | None,
    profiled: profile.Steps | None = None,
  ):
    self._config, self._workdir, self._compiled = config, workdir, step
    self._batches, self._heldout = batches, heldout
    self._mixture = mixture
    self._rows = partition.rows_here(config.data.batch_size, step.mesh)
    self._guards = guards_lib.Guards(config)
    self._records = records.Records(config, workdir)
    self._profiler = profile.Profiler(workdir, profiled)
    self._peak_tokens = counts.peak_tokens_per_s(config, step.mesh)
    self._last_inputs = self._inputs = None
    self._position = None  # in the data, after the last step's batch
    self._rolled_back_to = None  # the step of the last rollback's state
    self._checkpoints = checkpoint.Checkpoints(
      workdir, config, failed=self._not_saved
    )
    self._bar = console.progress_bar(
      config.num_steps,
      0,
      label or '',
      shown=label is not None and multihost.is_first(),
    )
    try:
      self._begin()
    except BaseException:
      self.__exit__()
      raise

  def _begin(self):
    extra = self._restore()
    if extra is not None:
      self._note_machine(extra.get('machine'))
      self._batches.set_state(extra['data'])
      self._guards.restore(extra['guards'])

  def _note_machine(self, then):
    """Says that sums may now be made in another order."""
    now = machine.identity()
    if then in (None, now) or not multihost.is_first():
      return
    change = ', '.join(
      f'{name}: {then.get(name)}, now {now[name]}'
      for name in now
      if then.get(name) != now[name]
    )
    console.print_line(
      f'goes on elsewhere ({change}): losses may differ in their last digits'
    )
    self._records.event(
      self._step, guard='machine', metric=change, policy='log'
    )

  def __enter__(self) -> 'Loop':
    return self

  def __exit__(self, *_):
    self._profiler.close()
    self._records.close()
    self._bar.close()
    self._batches.close()  # and the threads that read ahead
    self._checkpoints.__exit__()

  def run(self, stop_signal: preemption.StopSignal) -> dict[str, float]:
    """Trains to the end of the run and returns the metrics of its last step.

    Raises:
      multihost.RunStopped: the run was asked to stop, and is saved.
      guards.Stop: a guard stopped it.
      OSError: its end could not be saved.
    """
    with phases.phase(timeline.TRAINING):
      return self._run(stop_signal)

  def _run(self, stop_signal):
    pending, values = None, {}
    if self._step == 0 and self._config.probe_every:
      self._write_probe()  # of the initial model
    while self._step < self._config.num_steps:
      try:
        before, pending = pending, self._dispatch()
      except (ValueError, OSError):
        self._end_without_data(pending)
        raise
      if before is not None:
        values, events = self._fetch_metrics(before)
        if self._rolled_back(events, before):
          pending = None
          continue
        self._record(before.step, values)
      stopped = stop_signal.stopping(self._step)
      if self._step == self._config.num_steps:
        stopped = None
      if not (stopped or any(map(self._is_due, DUE))):
        continue
      values, events = self._fetch_metrics(pending)
      if self._is_due('eval_every'):
        values |= self._evaluated()
      if self._is_due('probe_every'):
        events += self._run_probe(values)
      before, pending = pending, None
      if self._rolled_back(events, before):
        continue
      self._record(before.step, values)
      if stopped or self._is_due('checkpoint_every'):
        self._save()
      if stopped:
        self._must_be_saved(stopped.why)
        self._records.mark('stopped', self._step)
        raise stopped
    self._must_be_saved('The run has come to its end')
    self._records.mark('end', self._step)
    # A run that was killed after its last save has no steps left.
    return values or self._evaluated()

  def _is_due(self, name) -> bool:
    every = getattr(self._config, name)
    last = self._step == self._config.num_steps
    return last or bool(every and self._step % every == 0)

  def _dispatch(self) -> Pending:
    skips = self._config.guards.loss_spike == 'skip_step'
    before = time.perf_counter()
    with phases.phase('waiting for data'):
      batch = next(self._batches)
    waited = time.perf_counter() - before
    limit, mesh = self._guards.loss_limit(), self._compiled.mesh
    self._step += 1
    tokens = partition.put_rows(
      batch, self._rows, self._config.data.batch_size, mesh
    )
    inputs = (limit if skips else math.inf, self._guards.memory.rate)
    if inputs != self._last_inputs:
      self._last_inputs = inputs
      self._inputs = self._compiled.inputs(*inputs)
    with (
      self._profiler.step(self._step),
      jax.transfer_guard('disallow'),
    ):
      self._state, metrics = self._compiled.train(
        self._state, tokens, self._inputs
      )
    self._position = self._batches.get_state()
    return Pending(self._step, limit, waited, self._position, metrics)

  def _end_without_data(self, pending):
    """Saves the steps before the data that could not be read."""
    # With several processes, the others may have read theirs.
    if self._position is None or multihost.count() > 1:
      return
    if pending is not None:
      values, _ = self._fetch_metrics(pending)
      self._record(pending.step, values)
    self._save()
    self._checkpoints.wait()

  def _fetch_metrics(self, pending):
    """Returns the metrics of a step, once it is done, and their events."""
    fetched = jax.device_get(pending.metrics)
    if self._profiler.is_last(pending.step):
      self._profiler.close()
    values = {name: float(value) for name, value in fetched.items()}
    now = time.perf_counter()
    values['time/step_s'] = now - self._clock
    values['time/tokens_per_s'] = (
      self._config.tokens_per_step / values['time/step_s']
    )
    values['time/data_wait_s'] = pending.data_wait_s
    if self._peak_tokens:
      values['time/mfu'] = values['time/tokens_per_s'] / self._peak_tokens
    self._clock = now
    return values, self._guards.step(pending.step, pending.limit, values)

  def _evaluated(self):
    """Held-out loss; at the end of the run over more rows, which are kept."""
    last = self._step == self._config.num_steps
    rows = self._heldout.final if last else self._heldout.periodic
    with phases.phase('evaluating'):
      nats = evaluate.row_nats(
        self._compiled, self._state, rows, self._config.data.batch_size
      )
      right = evaluate.right_answers(
        self._compiled, self._state, rows, self._config.data
      )
    if last and multihost.is_first():
      files.replace_array(self._workdir / workdir_lib.HELDOUT, nats)
    found = evaluate.losses(nats, rows, self._mixture.tokenizer)
    names = self._heldout.names
    sources = (
      self._heldout.final_sources if last else self._heldout.periodic_sources
    )
    for index, name in enumerate(names if len(names) > 1 else ()):
      mine = sources == index
      of = evaluate.losses(nats[mine], rows[mine], self._mixture.tokenizer)
      found |= {f'{key}/{name}': value for key, value in of.items()}
    return found | right

  def _run_probe(self, values) -> list[guards_lib.Event]:
    """Adds the numbers of a probe to the metrics; returns its events."""
    probe = self._write_probe()
    values['mhc/gain_fwd_max'] = float(probe['composite_fwd'].max())
    values['mhc/gain_bwd_max'] = float(probe['composite_bwd'].max())
    seen = guards_lib.measures(probe)
    values['mhc/stream_cosine'] = seen['cosine']
    values['mhc/stream_growth'] = seen['growth']
    values['mhc/sinkhorn_residual'] = seen['residual']
    return self._guards.probe(self._step, seen)

  def _write_probe(self) -> dict[str, Any]:
    rows = self._heldout.periodic[: self._config.probe_sequences, :-1]
    rows = partition.put(rows, self._compiled.mesh, partition.REPLICATED)
    with phases.phase('probing'):
      found = jax.device_get(self._compiled.probe(self._state, rows))
    self._records.probe(self._step, found)
    self._clock = time.perf_counter()
    return found

  def _record(self, step, values):
    phases.progress()
    self._records.metrics(step, values)
    self._bar.update()
    words = [
      f'loss {values["loss/train"]:.3f}',
      f'{values["time/tokens_per_s"]:,.0f} tokens/s',
    ]
    if 'time/mfu' in values:
      words.append(f'{values["time/mfu"]:.1%} of the peak')
    spent = phases.seconds()
    share = spent.get(timeline.TRAINING, 0.0) / sum(spent.values())
    words.append(f'trains {share:.0%} of the time')
    self._bar.set_postfix_str(', '.join(words), refresh=False)
    self._clock = time.perf_counter()

  def _rolled_back(self, events, pending) -> bool:
    """Follows the most severe policy; returns whether it rolled back.

    Raises:
      guards.Stop: the policy is 'stop'.
    """
    policy = guards_lib.most_severe(events)
    for event in events:
      if multihost.is_first():
        console.print_line(f'guard: {event}')
      self._records.event(**event._asdict())
    if policy == 'stop':
      raise guards_lib.Stop(f'stopped by a guard: {events[-1]}')
    if policy != 'rollback':
      return False
    if self._rolled_back_to is not None:
      self._checkpoints.discard(self._rolled_back_to)
    extra = self._restore()
    self._guards.roll_back(extra and extra['guards'])
    self._rolled_back_to = self._step
    # Continue with the data after the alert.
    self._batches.set_state(pending.position)
    self._records.event(
      pending.step, guard='rollback', metric='back to step', value=self._step
    )
    if multihost.is_first():
      console.print_line(
        f'guard: back to step {self._step}, on with the data after step '
        f'{pending.step}'
      )
    return True

  def _restore(self) -> dict[str, Any] | None:
    """Restores the newest state, or makes one; returns its other values."""
    compiled = self._compiled
    with phases.phase('restoring the state'):
      saved = self._checkpoints.restore(compiled.saved_state)
      if saved is None:
        self._state = start.state(self._config, compiled)
      else:
        self._state = compiled.to_pipeline_order(saved.state)
      self._step = int(self._state.step)
      extra = saved and saved.extra
      self._records.open(self._step, extra and extra.get('records'))
    self._bar.n = self._bar.initial = self._step
    self._bar.refresh()
    self._clock = time.perf_counter()
    return extra

  def _save(self):
    with phases.phase(SAVING):
      self._checkpoints.save(
        self._compiled.to_depth_order(self._state),
        {
          'data': self._position,
          'guards': self._guards.state(),
          'records': self._records.positions(),
          'machine': machine.identity(),
        },
      )
    self._records.mark('saved', self._step)
    self._clock = time.perf_counter()

  def _not_saved(self, step, reason):
    self._records.event(step, guard='save', metric=reason, policy='log')

  def _must_be_saved(self, why):
    for _ in range(2):
      with phases.phase(SAVING):
        saved = self._checkpoints.wait()
      if saved and self._step in self._checkpoints.steps():
        return
      self._save()
    if not self._checkpoints.wait():
      raise OSError(
        f'{why}: the state after step {self._step} could not be saved: '
        'make room; the same command then goes on from the last one saved'
      )
