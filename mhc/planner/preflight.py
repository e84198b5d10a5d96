"""What can be known of a run on a pod before a chip is asked for.

Nothing is compiled: sizes are counted and seconds estimated by formulas
(`search`); `launch/aot.py --topology=...` compiles the step.
"""

from collections.abc import Iterator
import shutil
from typing import NamedTuple

from mhc import config as config_lib
from mhc.data import corpus as corpus_lib
from mhc.data import mixture as mixture_lib
from mhc.kernels import chips
from mhc.parallel import counts
from mhc.parallel import mesh as mesh_lib
from mhc.planner import search
from mhc.planner import slices
from mhc.runtime import paths

# Bytes of a saved parameter: itself and its moments, float32.
SAVED = {'adamw': 12, 'muon': 8}
GIB = 2**30


class Check(NamedTuple):
  """One thing that was looked at."""

  what: str
  found: str
  problem: bool = False


def look(
  config: config_lib.Config, given: str, workdir: str
) -> Iterator[Check]:
  """Looks at a run on the slice that is `given`, as Cloud or we name it."""
  if '-' in given and given.partition('-')[0] not in slices.FAMILIES:
    yield Check('slice', f'{given}: its sides are not known here, nor its mesh')
    yield from _text(config)
    return
  try:
    topology = slices.topology(given)
    number = slices.num_devices(topology)
  except ValueError as error:
    yield Check('slice', str(error), True)
    return
  same = '' if topology == given else f'{given} is '
  yield Check('slice', f'{same}{topology}, {number} devices')
  yield _mesh(config, topology, number)
  if topology.partition(':')[0] in chips.CHIPS:
    yield from _estimated(config, topology, number)
  yield from _text(config)
  yield _states(config, workdir)


def _mesh(config, topology, number) -> Check:
  platform = 'tpu' if topology.partition(':')[0] in chips.CHIPS else 'gpu'
  try:
    shape = mesh_lib.sizes(config.mesh, config.data, number, platform)
  except ValueError as error:
    return Check('mesh', str(error), True)
  parts = mesh_lib.num_microbatches(
    config.mesh, config.data, shape[0] * shape[2]
  )
  return Check(
    'mesh',
    'data {} x pipe {} x expert {}'.format(*shape)
    + f', {config.data.batch_size} rows in {parts} microbatch(es)',
  )


def _estimated(config, topology, number) -> Iterator[Check]:
  hbm = chips.CHIPS[topology.partition(':')[0]].hbm
  try:
    plan = search.estimate(config, topology, number)
  except (ValueError, ZeroDivisionError):
    return  # no mesh, which has been said
  full = plan.bytes > search.FULL * hbm
  yield Check(
    'memory',
    f'{plan.bytes / GIB:.0f} of {hbm / GIB:.0f} GiB a device (formula)'
    + (
      ': find a mesh by launch/aot.py --suggest, or use more devices'
      if full
      else ''
    ),
    full,
  )
  hours = config.num_steps * plan.seconds / 3600
  yield Check(
    'time',
    f'{plan.seconds:.3g} s a step (formula, within {search.ERROR:.0%}), '
    f'{config.num_steps:,} steps in {hours / 24:.3g} days, '
    f'{hours * number:,.0f} device-hours',
  )


def _text(config) -> Iterator[Check]:
  tokens = config.num_steps * config.tokens_per_step
  try:
    mixture_lib.check_given(config)
  except ValueError as error:
    yield Check('text', str(error), True)
    return
  if config.data.task.name:
    yield Check('text', f'the task {config.data.task.name}: rows are made')
    return
  for path, _ in config.data.sources():
    if not path:
      yield Check('text', "the bytes of Python's standard library")
      continue
    try:
      found = paths.path(paths.given(path, 'data.path'))
    except ValueError as error:
      # Of a bucket, the pod may have the credentials or the package.
      yield Check('text', str(error), not paths.names_bucket(path))
      continue
    if not found.exists():
      yield Check('text', f'{path} is not on this machine: looked at there')
    elif not corpus_lib.is_tokens(path):
      yield Check('text', f'{path} is text: tokenised at every start')
    else:
      yield _tokens(config, path, tokens)


def _tokens(config, path, tokens) -> Check:
  data = config.data
  try:
    corpus = corpus_lib.load(
      path, data.on_damage, data.text_field, data.token_dtype
    )
    corpus_lib.check_vocabulary(corpus, config.model.vocab_size)
  except (ValueError, OSError) as error:
    return Check('text', str(error), True)
  epochs = tokens / corpus.num_train_tokens
  return Check(
    'text',
    f'{path}: {corpus.num_train_tokens:,} tokens to train on, '
    f'{epochs:.3g} epochs'
    + (
      f' (above {mixture_lib.MANY_EPOCHS:g}, new text is worth more)'
      if epochs > mixture_lib.MANY_EPOCHS
      else ''
    ),
  )


def _states(config, workdir) -> Check:
  count = counts.count(config.model, config.data.seq_len)
  size = SAVED[config.optimizer.name] * count['total_params']
  kept = (config.keep_checkpoints + 1) * size
  found = (
    f'{count["total_params"]:,} parameters; a checkpoint takes '
    f'{size / GIB:.3g} GiB, {config.keep_checkpoints} kept and one written '
    f'{kept / GIB:.3g}'
  )
  folder = paths.path(workdir)
  if not workdir or paths.in_bucket(folder):
    return Check('checkpoints', found)
  folder = folder.absolute()
  folder = folder if folder.exists() else folder.parent
  if folder.exists():  # else it is of another machine
    free = shutil.disk_usage(folder).free
    if free < kept:
      found += f'; {folder} has {free / GIB:.3g} free'
      return Check('checkpoints', found, True)
  return Check('checkpoints', found)
