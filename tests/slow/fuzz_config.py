"""Random settings: one training step, or one line that says why not.

    python tests/slow/fuzz_config.py --configs 2000 --seed 0 --processes 1

Changes one to four settings at a time of small models (dense, with experts, in
a pipeline, both), most to plausible values, some to nonsense: other types, the
ends of ranges, nan, misspelt names. Each goes as a dict and as a command line,
which must agree. What is accepted has to compile on eight CPU devices, start
with a finite loss, make an update of finite parameters and trace what scores
and probes; what is refused has to be by a ValueError or OSError of one line
that names a setting that was changed and its value. Anything else is a failure,
as are a crash and more than `SECONDS`. Settings that make the same programs are
run once. Comparisons are only made, and some cases go through launch/train.py
as well. A model is not tried if it is not refused but would take more than
`ROOM` or too long to compile here. Prints the counts, exit status 1 for
failures, each with a command that shows it; `--only=N` takes case N alone.
What is refused takes three minutes; some 480 programs are compiled, those with
a value that is new before the others, at 5 s of an idle core or more each, for
as long as `--minutes`. tests/config/test_fuzz_config.py does less.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import queue
import re
import resource
import select
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import typing
from typing import Any, Literal, NamedTuple
from unittest import mock

if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 '
    '--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0'
  )

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from mhc import config as config_lib
from mhc.config import comparison as comparison_lib
from mhc.config import dicts
from mhc.data import batches as batches_lib
from mhc.parallel import memory
from mhc.parallel import mesh as mesh_lib
from mhc.parallel import partition
from mhc.parallel.placement import Placement
from mhc.runtime import cli
from mhc.training import checkpoint
from mhc.training import step

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 60
# Bytes that a case may take by formula, and a child in all.
ROOM, LIMIT = 2**29, 10 * 2**30
TINY = {
  'num_steps': 40,
  'model.num_blocks': 2,
  'model.dim': 16,
  'model.ffn_dim': 16,
  'model.attention.head_dim': 8,
  'model.attention.rope_dim': 4,
  'model.attention.kv_rank': 8,
  'data.path': str(ROOT / 'mhc' / '*.py'),  # beside it may be bytecode
  'data.seq_len': 8,
  'eval_sequences': 8,
  'mesh.num_devices': 1,
}
EXPERTS = {'model.moe.num_experts': 4, 'model.moe.expert_dim': 8}
PIPE = {
  'mesh.pipe': 2,
  'mesh.num_devices': 2,
  'mesh.schedule': '1f1b',
  'data.microbatch_size': 4,
}
SPLIT = {'mesh.expert': 2, 'mesh.num_devices': 4, 'data.microbatch_size': 2}
BASES = (
  TINY,
  TINY | {'mesh.num_devices': 0},
  TINY | EXPERTS,
  TINY | EXPERTS | SPLIT,
  TINY | PIPE,
  TINY | EXPERTS | PIPE | SPLIT,
)
# Of how many cases in ten each starts; what compiles slowly seldom.
SHARES = (0.4, 0.2, 0.1, 0.1, 0.15, 0.05)
INTS = (
  *(0, -1, 1, 2, 3, 5, 7, 257, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**63),
  *(10**20, 10**400, -(2**63), True, False, None, 1.5, 2.0, float('nan')),
  *(float('inf'), '', 'ten', '3', '1e3', (), (1,), [2], {}, {'a': 1}),
)
FLOATS = (
  *(0.0, -0.0, -1.0, 1, 0, 1e-30, 1e-40, 1e-46, 1e-300, 1e6, 1e30, 3.4e38),
  *(3.5e38, 1e300, 10**30, 10**400, float('nan'), float('inf'), -float('inf')),
  *(0.9999999, 1 - 1e-12, True, None, '', 'x', '0.1', (0.1,), [], {}),
)
TUPLES = (
  *((), (0.5,), (0.5, 0.7), (0.9, 0.8), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0)),
  *((0.1, 0.2, 0.3), (1, 2), (-0.5, 0.5), (float('nan'), 0.5), (1e-46, 0.5)),
  *((1e39, 0.5), (0.5, 'x'), (0.5, None), (0.5, (0.7,)), [0.5, 0.7], 0.5),
  *('abc', None, (10**400, 1), (0.2, True), (0.0, 0.0), (3e38, 1e38)),
)
BOOLS = (True, False, 0, 1, 'yes', '', None, 'True', 2.0, ())
STRINGS = (
  *('/nowhere', '', '*', 'x' * 5000, 'a\nb', '\0', '~', 'gs://bucket/x', '['),
  *(3, None, True, (), '/dev/null', '/', str(ROOT / 'LICENSE'), 'mhc/*.py'),
  str(ROOT / 'pyproject.toml'),
)
# Plausible values, for settings whose default says too little.
PLAUSIBLE = {
  'seed': (1, 7, 123456, 2**31 - 1),
  'num_steps': (31, 32, 50, 400, 50_000, 10**6),
  'model.vocab_size': (258, 259, 320, 321, 384),
  'model.num_blocks': (1, 2, 3, 4, 5, 8),
  'model.dim': (1, 2, 3, 15, 16, 20, 32, 128),
  'model.ffn_dim': (1, 7, 16, 33),
  'model.norm_eps': (0.0, 1e-6, 1e-5, 1e-20),
  'model.recompute_every': (0, 2, 4, 6, 100),
  'model.attention.num_heads': (1, 2, 3, 4),
  'model.attention.head_dim': (1, 2, 5, 8),
  'model.attention.rope_dim': (2, 4, 6),
  'model.attention.kv_rank': (1, 3, 8),
  'model.attention.query_rank': (0, 1, 8),
  'model.attention.rope_theta': (1.0, 100.0, 500_000.0, 1e6),
  'model.connection.num_streams': (1, 2, 3, 4, 5, 6, 8),
  'model.connection.sinkhorn_iters': (1, 2, 5, 20, 50),
  'model.connection.sinkhorn_eps': (0.0, 1e-6, 1e-12, 1e-2),
  'model.moe.num_experts': (0, 1, 2, 3, 4, 6, 8),
  'model.moe.experts_per_token': (1, 2, 3, 4, 5),
  'model.moe.num_shared': (0, 1, 2),
  'model.moe.expert_dim': (1, 4, 8, 9),
  'model.moe.num_dense_blocks': (0, 1, 2, 3),
  'model.moe.bias_speed': (0.0, 0.1, 1.0),
  'model.moe.balance_loss': (0.0, 1e-4, 0.1, 10.0),
  'model.moe.capacity_factor': (0.1, 1.0, 2.0, 100.0),
  'model.moe.buffer_factor': (0.01, 0.5, 1.0, 3.0, 100.0),
  'optimizer.learning_rate': (1e-4, 1e-2, 1.0),
  'optimizer.warmup_steps': (0, 1, 20, 39),
  'optimizer.decay_points': ((), (0.8, 0.9), (0.3, 0.6), (0.5,)),
  'optimizer.decay_factors': ((), (0.3, 0.1), (1.0, 2.0), (0.5,)),
  'optimizer.b1': (0.0, 0.5, 0.99),
  'optimizer.b2': (0.0, 0.9, 0.999),
  'optimizer.eps': (1e-8, 1e-15),
  'optimizer.weight_decay': (0.0, 0.01, 1.0),
  'optimizer.muon_momentum': (0.0, 0.9),
  'optimizer.clip_norm': (0.0, 0.1, 10.0),
  'data.path': (str(ROOT / 'tests' / '*.py'), str(ROOT / 'kernels' / '*.py')),
  'data.seq_len': (2, 3, 7, 8, 16, 64),
  'data.batch_size': (1, 2, 3, 4, 6, 8, 12, 16),
  'data.microbatch_size': (0, 1, 2, 3, 4),
  'mesh.num_devices': (0, 1, 2, 3, 4, 6, 8, 16),
  'mesh.pipe': (1, 2, 3, 4, 8),
  'mesh.expert': (1, 2, 3, 4),
  'mesh.chunks': (2, 3, 4),
  'mesh.num_sub_batches': (1, 2, 4),
  'guards.spike_window': (16, 64),
  'guards.rollback_rate': (0.5, 1.0),
  'checkpoint_every': (0, 10, 20),
  'keep_every': (0, 20, 40),
}
# What is changed together.
GROUPS = (
  'model.moe mesh.expert mesh.num_devices mesh.num_sub_batches '
  'model.num_blocks '
  'data.batch_size data.microbatch_size',
  'mesh model.num_blocks data.batch_size data.microbatch_size '
  'model.moe.num_dense_blocks model.vocab_size',
  'model.connection model.recompute model.recompute_every model.dim '
  'model.dtype',
  'optimizer guards num_steps',
  'model.attention model.dim model.dtype model.norm_eps data.seq_len',
  'num_steps eval_every probe_every checkpoint_every keep_checkpoints '
  'keep_every eval_sequences data tensorboard seed',
)
# What compiled programs do not depend on.
OUTSIDE = {
  'seed': 0,
  'eval_every': 0,
  'probe_every': 0,
  'checkpoint_every': 0,
  'keep_every': 0,
  'keep_checkpoints': 1,
  'eval_sequences': 1,
  'tensorboard': False,
  'data.path': '',
  'data.on_damage': 'stop',
  'mesh.overlap': True,
}
PANELS = {
  'title': ('', 'x', 3, None),
  'kinds': (('mhc',), ('mch',), (), ('mhc', 'mhc'), 'mhc', (3,), None, ['hc']),
  'seeds': ((0, 1), (), (0, 0), (-1,), (2**63,), (1.5,), (True,), 3, ([],)),
  'num_blocks': ((1, 2), (0,), (10**9,), ('3',), None, ({},)),
  'learning_rates': ((1e-3, 1), (0.0,), (float('nan'),), (1e39,), (-1,), 'x'),
  'num_steps': (31, 30, 0, 10**20, None),
  'batch_size': (1, 0, -8, True, 2.0),
  'clip_norm': (0, 1.0, -1, float('inf')),
  'router': ('', 'bias', 'bais', None),
}


class Case(NamedTuple):
  """What is changed of one of `BASES`."""

  base: dict[str, Any]
  changes: dict[str, Any]


@functools.cache
def hints() -> dict[str, Any]:
  """Dotted name -> type of every setting."""

  def of(cls, path):
    for name, hint in typing.get_type_hints(cls).items():
      if dataclasses.is_dataclass(hint):
        yield from of(hint, f'{path}{name}.')
      else:
        yield path + name, hint

  return dict(of(config_lib.Config, ''))


def nonsense(hint) -> tuple:
  """Values that mostly are none of the type, or at the ends of its range."""
  if typing.get_origin(hint) is Literal:
    known = typing.get_args(hint)
    first, last = known[0], known[-1]
    misspelt = (first[:-1], last.upper(), f' {first}', first[::-1])
    return (*misspelt, '', 'none', 'auto', None, 3, True, (), known, [], {})
  if typing.get_origin(hint) is tuple:
    return TUPLES
  return {int: INTS, float: FLOATS, bool: BOOLS, str: STRINGS}[hint]


def plausible(name: str, hint) -> tuple:
  if name in PLAUSIBLE:
    return PLAUSIBLE[name]
  if typing.get_origin(hint) is Literal:
    return typing.get_args(hint)
  return {int: (0, 1, 5, 100), float: (0.5, 1.0, 20.0), bool: (True, False)}[
    hint
  ]


def case(number: int, seed: int) -> Case:
  """The case of that number."""
  rng = np.random.default_rng([seed, number])

  def pick(values):
    return values[rng.integers(len(values))]

  names = [*hints()]
  if rng.random() < 0.7:
    starts = pick(GROUPS).split()
    names = [
      name
      for name in names
      if any(name == one or name.startswith(f'{one}.') for one in starts)
    ]
  changes = {}
  for _ in range(pick((1, 1, 2, 2, 3, 4))):
    name = pick(names)
    chance = rng.random()
    values = nonsense(hints()[name])
    if chance < 0.78:
      values = plausible(name, hints()[name])
    changes[name] = pick(values)
    if chance > 0.985:
      changes[_misspelt(rng, name)] = changes.pop(name)
  return Case(BASES[rng.choice(len(BASES), p=SHARES)], changes)


def _misspelt(rng, name):
  place = int(rng.integers(len(name)))
  ways = (
    name[:place] + name[place + 1 :],
    name[:place] + 'x' + name[place:],
    name.upper(),
    name.rpartition('.')[2],
    f'{name}.{name}',
    f'model.{name}',
    '',
  )
  return ways[rng.integers(len(ways))]


def nested(settings: dict[str, Any]) -> dict[str, Any]:
  """Dotted names as groups; a name below a setting stays as it is."""
  tree = {}
  for name, value in settings.items():
    *path, last = name.split('.')
    place = tree
    for part in path:
      place = place.setdefault(part, {})
      if not isinstance(place, dict):
        raise ValueError(f'{name}={value!r} is no setting')
    place[last] = value
  return tree


def command(settings: dict[str, Any]) -> list[str]:
  """The flags that ask for them."""
  return [
    f'--config.{name}={value if isinstance(value, str) else repr(value)}'
    for name, value in settings.items()
  ]


def from_flags(settings: dict[str, Any]) -> config_lib.Config:
  """As `launch/train.py --config.NAME=VALUE ...` makes it."""
  arguments = ['train.py', f'--config={ROOT / "configs" / "tiny.py"}']
  arguments += command(settings)
  values = flags.FlagValues()
  with mock.patch.object(sys, 'argv', arguments):
    config_flags.DEFINE_config_file('config', flag_values=values)
    cli._check_names(arguments)
    values(arguments)
  return dicts.from_dict(config_lib.Config, values.config.to_dict())


def unclear(message: str, changes: dict[str, Any]) -> str:
  """What is wrong with a refusal, '' for nothing."""
  if '\n' in message:
    return 'more than one line'
  unknown = re.match(r"unknown setting '(?:base\.|config\.)?(.*?)';", message)
  if unknown and any(name.startswith(unknown[1]) for name in changes):
    return ''
  for name, value in changes.items():
    spellings = [str(value), repr(value)]
    if isinstance(value, int) and abs(value) < 10**300:
      spellings.append(str(float(value)))
    elif isinstance(value, int):
      spellings.append('inf')  # of a flag
    if isinstance(value, list):
      spellings.append(repr(tuple(value)))
    if isinstance(value, tuple):
      spellings += map(repr, value)
      numbers = [type(v) is int and abs(v) < 10**300 for v in value]
      if all(numbers):
        spellings.append(repr(tuple(map(float, value))))
    last = name.rpartition('.')[2]
    known = name in hints()
    if last in message and (
      not known or any(text in message for text in spellings)
    ):
      return ''
  return 'no setting that was changed, with its value'


def refusal(make, changes) -> tuple[Any, str, str]:
  """(what it makes, '' or why it refuses, '' or what is wrong with that)."""
  try:
    return make(), '', ''
  except (ValueError, OSError) as error:
    return None, str(error), unclear(str(error), changes)


def programs_of(config: config_lib.Config, num_devices: int) -> tuple:
  """Two keys: equal for the same gradients, and for the same updates."""
  model = config.model
  changes = OUTSIDE | {'mesh.num_devices': num_devices}
  changes['num_steps'] = TINY['num_steps']
  changes['optimizer'] = dicts.to_dict(config_lib.OptimizerConfig())
  changes['guards'] = dicts.to_dict(config_lib.GuardsConfig())
  if config.mesh.pipe == 1:
    changes |= {'mesh.chunks': 2, 'mesh.schedule': 'gpipe', 'mesh.head': 'last'}
  if model.connection.implementation == 'auto':
    changes['model.connection.implementation'] = 'xla'
  if not model.connection.kind.startswith('mhc') or (
    model.connection.kind == 'mhc_lite'
  ):
    changes |= _usual(
      'model.connection.sinkhorn_iters',
      'model.connection.sinkhorn_eps',
      'model.connection.sinkhorn_backward',
    )
  if not model.moe.num_experts:
    changes['model.moe'] = dicts.to_dict(config_lib.MoEConfig())
  else:
    if model.moe.dispatch == 'dropless':
      changes |= _usual('model.moe.capacity_factor')
    if config.mesh.expert == 1:
      changes |= _usual('model.moe.transport', 'model.moe.buffer_factor')
    if model.moe.router != 'bias':
      changes |= _usual('model.moe.bias_speed')
  if model.recompute == 'none':
    changes |= _usual('model.recompute_every')
  guards = config_lib.GuardsConfig(
    nonfinite=config.guards.nonfinite,
    loss_spike=config.guards.loss_spike,
    rollback_rate=0.5 if config.guards.rollback_rate < 1 else 1.0,
  )
  return (
    (dicts.replace(config, **nested(changes)), config.optimizer.name),
    (config.optimizer, config.num_steps, guards),
  )


def _usual(*names):
  known = dicts.leaves(config_lib.Config())
  return {name: known[name] for name in names}


class Runner:
  """Runs configs, each program once.

  Attributes:
    work: 'check' does what `train.train` does before any work, 'build' what
      comes before something compiles, 'new' compiles what has a value of a
      setting that has not been compiled, 'all' everything.
  """

  def __init__(self, work: Literal['check', 'build', 'new', 'all'] = 'all'):
    self.work, self._done, self._seen = work, set(), set()
    self._compiled = 0

  def __call__(self, config: config_lib.Config) -> str:
    """One step as `train.train` makes it: what became of it."""
    corpus, vocab_size = batches_lib.load_for(config), config.model.vocab_size
    batches = batches_lib.train_batches(
      corpus, config.data, config.seed, vocab_size
    )
    heldout = batches_lib.heldout_rows(
      corpus, config.data.seq_len, config.eval_sequences, vocab_size
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
      # The update does not know what it is an update of.
      small = dicts.from_dict(config_lib.Config, nested(TINY))
      config = dataclasses.replace(
        small,
        num_steps=config.num_steps,
        optimizer=config.optimizer,
        guards=config.guards,
      )
      mesh = mesh_lib.make_mesh(config.mesh, config.data)
    programs = step.build(config)
    if self._is_large(config, programs):
      return 'not tried'
    batch = next(
      batches_lib.train_batches(corpus, config.data, config.seed, 320)
    )
    values = {*dicts.leaves(config).items()}
    if self.work == 'build' or (self.work == 'new' and values <= self._seen):
      return 'built'
    self._seen |= values
    self._done.update(keys)
    self._compiled += 1
    if self._compiled % 20 == 0:
      step._build.cache_clear()
      jax.clear_caches()
    with jax.transfer_guard('allow'):
      tokens = partition.put(batch, mesh, partition.BATCH)
      state = programs.init(config.seed)
      jax.eval_shape(programs.token_losses, state, tokens)
      row = partition.put(heldout[:1, :-1], mesh, partition.REPLICATED)
      jax.eval_shape(programs.probe, state, row)
      state, metrics = programs.train(state, tokens, programs.inputs())
      loss = float(metrics['loss/train'])
    assert np.isfinite(loss), f'the first loss is {loss}'
    if not _is_wild(config):
      for name, value in metrics.items():
        assert np.isfinite(value), f'{name} is {value}'
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), f'{name} is not finite after a step'
    return 'ran'

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


def _is_wild(config):
  """Whether an update may well be beyond float32."""
  rates = [
    config.optimizer.learning_rate,
    config.optimizer.weight_decay,
    config.model.moe.balance_loss,
    *config.optimizer.decay_factors,
  ]
  return max(rates) > 1e6


def check(one: Case, runner: Runner) -> tuple[str, str]:
  """(outcome, message) of a case.

  The outcome is 'ran', 'ran before', 'built', 'refused', 'not tried' or
  'failed'.
  """
  settings = one.base | one.changes
  try:
    config, why, wrong = refusal(
      lambda: dicts.from_dict(config_lib.Config, nested(settings)), one.changes
    )
    try:
      flagged, text, bad = refusal(lambda: from_flags(settings), one.changes)
    except flags.Error as error:
      flagged, text = None, ' '.join(str(error).split())
      bad = unclear(text, one.changes)
    if wrong or bad:
      return 'failed', f'{wrong or bad}: {why if wrong else text}'
    if config and flagged and config != flagged:
      return 'failed', f'flags make another config: {flagged}'
    if (config or flagged) is None:
      return 'refused', why
    outcome, why, wrong = refusal(
      lambda: runner(config or flagged), one.changes
    )
    if wrong:
      return 'failed', f'{wrong}: {why}'
    return outcome or 'refused', why
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      raise
    place = error.__traceback__
    while place.tb_next and '/site-packages/' not in str(
      place.tb_next.tb_frame.f_code.co_filename
    ):
      place = place.tb_next
    where = f'{place.tb_frame.f_code.co_filename}:{place.tb_lineno}'
    return 'failed', f'{error!r}'[:1000] + f' at {where}'


def check_comparison(number: int, seed: int) -> tuple[str, str]:
  """The same of a comparison, which is only made."""
  rng = np.random.default_rng([seed, number, 1])
  names = [*PANELS]
  panel = {}
  for _ in range(rng.integers(1, 4)):
    name = names[rng.integers(len(names))]
    panel[name] = PANELS[name][rng.integers(len(PANELS[name]))]
  base = case(number, seed)
  values = {'panels': {'main': panel}}
  changes = {f'panel.{name}': value for name, value in panel.items()}
  if rng.random() < 0.3:
    values['base'] = nested(base.changes)
    changes |= base.changes
  try:
    made, why, wrong = refusal(
      lambda: dicts.from_dict(comparison_lib.Comparison, values), changes
    )
  except Exception as error:
    return 'failed', f'{values}: {error!r}'
  # Of a run it names the run's setting, not the panel's list.
  if wrong and not re.search('|'.join(_singular(panel)), why):
    return 'failed', f'{values}: {wrong}: {why}'
  return ('made' if made else 'refused'), why


def _singular(panel):
  words = {
    'kinds': 'kind',
    'seeds': 'seed',
    'num_blocks': 'num_blocks|moe.num_dense_blocks',
    'learning_rates': 'learning_rate',
    'num_steps': 'num_steps',
  }
  return [f'{words.get(name, name)}=' for name in panel]


def launched(one: Case, scratch: pathlib.Path) -> tuple[str, str]:
  """The same of launch/train.py, as a user runs it."""
  settings = one.base | one.changes
  for name, value in {'num_steps': 2, 'optimizer.warmup_steps': 1}.items():
    if settings.get(name, 0) in PLAUSIBLE[name] or name not in one.changes:
      settings[name] = value
  workdir = scratch / f'{len([*scratch.iterdir()])}'
  try:
    result = subprocess.run(
      [
        sys.executable,
        ROOT / 'launch' / 'train.py',
        *command(settings),
        f'--workdir={workdir}',
      ],
      capture_output=True,
      text=True,
      check=False,
      timeout=SECONDS * 10,
    )
  except subprocess.TimeoutExpired as error:
    return 'failed', str(error)
  except ValueError:  # a NUL, which no command line can hold
    return 'refused', ''
  lines = result.stderr.strip().splitlines()
  errors = [line for line in lines if line.startswith('error')]
  outcome = {0: 'ran', 2: 'refused'}.get(result.returncode, 'failed')
  unclear = outcome == 'refused' and (len(errors) != 1 or workdir.exists())
  if unclear or 'Traceback' in result.stderr:
    outcome = 'failed'
  return outcome, '\n'.join(lines[-20:] if outcome == 'failed' else errors)


def shown(one: Case) -> str:
  """A command line that shows the case."""
  with_ = [*command(one.base | one.changes), '--workdir=/tmp/fuzz']
  flags_ = ' '.join(map(shlex.quote, with_))
  return f'python launch/train.py {flags_[:1500]}'


def _child(arguments):
  """Cases in a process of their own, a line of JSON each."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
  end = time.monotonic() + 60 * arguments.minutes
  runner, numbers, later = Runner('new'), arguments.numbers, []
  while numbers:
    for number in numbers:
      if time.monotonic() > end:
        runner.work = 'build'
      print(json.dumps([number]), file=out, flush=True)
      begun = time.process_time()
      result = check(case(number, arguments.seed), runner)
      took = time.process_time() - begun
      if took > SECONDS:
        result = 'failed', f'took {took:.0f} s'
      if result[0] == 'built' and runner.work == 'new':
        later.append(number)
      else:
        print(json.dumps([number, *result]), file=out, flush=True)
    numbers, later, runner.work = later, [], 'all'


def _watched(numbers, arguments, scratch):
  """(number, outcome, message), a crash or a hang counted as failed."""
  numbers, errors = list(numbers), scratch / f'stderr{numbers[0]}'
  end = time.monotonic() + 60 * arguments.minutes
  while numbers:
    child = subprocess.Popen(
      [
        sys.executable,
        __file__,
        '--child',
        f'--seed={arguments.seed}',
        f'--numbers={",".join(map(str, numbers))}',
        f'--minutes={max(0, end - time.monotonic()) / 60}',
      ],
      stdout=subprocess.PIPE,
      stderr=errors.open('w'),
      bufsize=0,
    )
    buffered, alive, at = b'', True, numbers[0]
    while alive:
      # A child looks at its own time; others may have most of the machine's.
      if not select.select([child.stdout], [], [], 5 * SECONDS)[0]:
        child.kill()
        break
      part = os.read(child.stdout.fileno(), 2**16)
      alive = bool(part)
      *lines, buffered = (buffered + part).split(b'\n')
      for line in lines:
        at, *result = json.loads(line)
        if result:
          numbers.remove(at)
          yield at, *result
    child.wait()
    child.stdout.close()
    if numbers:
      why = errors.read_text(errors='replace')[-1500:]
      numbers.remove(at)
      yield at, 'failed', f'exit status {child.returncode}: {why}'


def _together(numbers, arguments, scratch):
  """The results of several children as they come."""
  results, each = queue.Queue(), arguments.processes
  parts = [numbers[k::each] for k in range(min(each, len(numbers)))]

  def put(part):
    for result in _watched(part, arguments, scratch):
      results.put(result)
    results.put(None)

  for part in parts:
    threading.Thread(target=put, args=(part,), daemon=True).start()
  running = len(parts)
  while running:
    result = results.get()
    running -= result is None
    if result is not None:
      yield result


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--configs', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--launches', type=int, default=20)
  parser.add_argument('--only', default='', help='Numbers, with commas.')
  parser.add_argument('--verbose', action='store_true')
  parser.add_argument(
    '--minutes',
    type=float,
    default=600,
    help='After which nothing is compiled any more.',
  )
  parser.add_argument('--numbers', default='', help=argparse.SUPPRESS)
  parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    arguments.numbers = [int(n) for n in arguments.numbers.split(',')]
    _child(arguments)
    return 0
  numbers = [*range(arguments.configs)]
  if arguments.only:
    numbers = [int(number) for number in arguments.only.split(',')]
    arguments.launches = 0
  seed, counts, tried = arguments.seed, collections.Counter(), []

  def count(what, outcome, message, how):
    counts[outcome] += 1
    if outcome == 'failed' or arguments.verbose:
      print(f'{outcome}: {what}: {message}\n  {how}', flush=True)

  with tempfile.TemporaryDirectory() as name:
    scratch = pathlib.Path(name)
    for number, outcome, message in _together(numbers, arguments, scratch):
      one = case(number, seed)
      if outcome not in ('failed', 'not tried'):
        tried.append(number)
      count(f'#{number} {one.changes}', outcome, message, shown(one))
      if sum(counts.values()) % 100 == 0:
        print(f'{sum(counts.values())}: {dict(counts)}', flush=True)
    for number in range(0 if arguments.only else arguments.configs):
      outcome, message = check_comparison(number, seed)
      counts['comparisons'] += 1
      if outcome == 'failed':
        count(f'comparison #{number}', outcome, message, '')
    runs = scratch / 'runs'
    runs.mkdir()
    for index in range(min(arguments.launches, len(tried))):
      number = sorted(tried)[index * len(tried) // arguments.launches]
      one = case(number, seed)
      outcome, message = launched(one, runs)
      counts['launches'] += 1
      if arguments.verbose:
        print(f'{outcome}: launch #{number} {one.changes}: {message}')
      if outcome == 'failed':
        count(f'launch #{number} {one.changes}', outcome, message, shown(one))
  ran = counts['ran'] + counts['ran before']
  print(
    f'{len(numbers)} settings: {ran} ran, {counts["ran before"]} of them the '
    f'same programs as others; {counts["built"]} were built but for lack of '
    f'time not compiled; {counts["refused"]} were refused in one line; '
    f'{counts["not tried"]} were too large to be tried here; '
    f'{counts["comparisons"]} comparisons, {counts["launches"]} launches; '
    f'{counts["failed"]} failures'
  )
  return int(bool(counts['failed']))


if __name__ == '__main__':
  sys.exit(main())
