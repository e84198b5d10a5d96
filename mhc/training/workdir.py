"""The work directory of a run, which belongs to that run alone.

    config.json         the settings; for those that may change, the latest
    tokenizer.json      the vocabulary, if it is not bytes, see `vocabulary`
    text.json           digest of the text, see `text`
    metrics.jsonl       a line a step: loss, gradient norm, rate, time; held-out
                        loss and the metrics of guards where measured
    probes.jsonl        gains, streams and mean mappings on held-out rows
    events.jsonl        alerts and actions of guards, failed saves
    timeline.jsonl      where the time went, see `timeline`
    checkpoints/STEP    the states, see `checkpoint`
    damaged/STEP        corrupted states
    heldout.npy         nats of each held-out row at the end, float32 [rows]
    tensorboard/        a copy of the metrics, if `tensorboard` is set
    *.old               records that a resumed run did not find as it left them
    lock/               who trains it now, see `mhc.runtime.leases`
    summary.json        written last: size, data, losses and devices of the run

This module reads everything but the parameters, which are read by
`checkpoint.restore_model`.
"""

from collections.abc import Mapping, Sequence
import os
from typing import Any

from mhc import config as config_lib
from mhc.config import aliases, dicts
from mhc.runtime import config_file
from mhc.runtime import files
from mhc.runtime import paths

CONFIG, SUMMARY = config_file.NAME, 'summary.json'
read_config = config_file.read
HELDOUT = 'heldout.npy'
METRICS, PROBES, EVENTS = 'metrics.jsonl', 'probes.jsonl', 'events.jsonl'
CHECKPOINTS, DAMAGED = 'checkpoints', 'damaged'
TENSORBOARD, LOCK = 'tensorboard', 'lock'
# Names that only a run makes: without a config, a run has lost it.
PARTS = SUMMARY, METRICS, PROBES, EVENTS, CHECKPOINTS, DAMAGED, HELDOUT

# Settings that may change when a run is resumed, beside those of the mesh: none
# enters the computation, except microbatch_size for what depends on the tokens
# taken together.
MUTABLE_ON_RESUME = (
  'eval_every',
  'probe_every',
  'probe_sequences',
  'checkpoint_every',
  'keep_checkpoints',
  'keep_every',
  'tensorboard',
  'wandb',
  'watchdog_s',
  'data.on_damage',
  'data.microbatch_size',
  'data.read_ahead',
)


def check_path(workdir: paths.Path):
  """Checks that every library that is given the path can use it.

  Raises:
    ValueError: it has characters that one of them takes for a pattern, or that
      are no text.
  """
  text = str(paths.absolute(workdir))
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(
      f'{os.fsencode(text)!r} is not UTF-8: choose another --workdir, or give '
      'a link to it'
    ) from None
  if bad := sorted({*text} & {*'*?[]{}', *map(chr, range(32)), '\x7f'}):
    raise ValueError(
      f'--workdir={text!r} has {", ".join(map(repr, bad))} in its path, which '
      'the checkpoint library takes for a pattern: choose another, or give a '
      'link to it'
    )


def check(workdir: paths.Path, config: config_lib.Config):
  """Checks that `workdir` is unused or holds this run; changes nothing.

  Raises:
    ValueError: it holds something else, or a run with other settings.
  """
  check_path(workdir)
  if (workdir / CONFIG).exists():
    difference = other_setting(dicts.leaves(read_config(workdir)), config)
    if difference:
      raise ValueError(
        f'{workdir} holds a run with {difference}: choose another --workdir'
      )
  elif workdir.exists() and not workdir.is_dir():
    raise ValueError(f'{workdir} is a file: choose a folder as --workdir')
  elif parts := [name for name in PARTS if (workdir / name).exists()]:
    raise ValueError(
      f'{workdir} holds {", ".join(parts)} of a run but no {CONFIG}: put that '
      'back, or choose another --workdir'
    )


def other_setting(old: Mapping[str, Any], config: config_lib.Config) -> str:
  """Returns the first setting in which an `old` run differs, '' for none.

  Those of `MUTABLE_ON_RESUME`, of the mesh and of guards do not count.
  """
  ours = files.jsonable(dicts.leaves(config))
  old = dict(aliases.current(*item) for item in files.jsonable(old).items())
  for name, new in ours.items():
    free = name in MUTABLE_ON_RESUME or name.startswith(('mesh.', 'guards.'))
    # Settings that an earlier version did not have were at their defaults.
    if not free and name in old and old[name] != new:
      why = ' (the learning rate is scheduled over it)'
      own = why if name == 'num_steps' else ''
      return f'{name}={old[name]!r}, this one has {new!r}{own}'
  return ''


def initialize(workdir: paths.Path, config: config_lib.Config):
  """Makes `workdir` the work directory of this run, after `check`."""
  check(workdir, config)
  if not paths.in_bucket(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  config_file.write(workdir, config)


def read_summary(
  workdir: paths.Path, needed: Sequence[str] = ()
) -> dict | None:
  """Reads the summary of a finished run; None for an unfinished one.

  Raises:
    ValueError: it is damaged, or has no entry of a name that is `needed`.
  """
  file = workdir / SUMMARY
  if not file.exists():
    return None
  summary = files.read_json(file)
  for name in needed:
    if name not in summary:
      raise ValueError(
        f'{file} is damaged: it has no {name!r}; delete it, and the command '
        'that trained the run makes it again'
      )
  return summary
