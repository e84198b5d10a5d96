"""What a run leaves in its folder so that it can go on: settings and states.

    config.json      the settings, of `FREE` the latest; a folder belongs to
                     one run
    checkpoints/     the newest states, each with the position in the data

A state is written under a temporary name and renamed, so a killed process
leaves the one before. Processes that train together write it together, each its
part of the arrays; other processes, on another mesh, can go on from it.
"""

import json
import pathlib

import grain
import orbax.checkpoint as ocp

from mhc import config as config_lib
from mhc import plain
from mhc import step
from mhc import writer

# Settings that may change when a run goes on, beside those of the mesh: none
# enters the computation, but the last for what depends on the tokens that are
# taken together.
FREE = (
  'eval_every',
  'probe_every',
  'checkpoint_every',
  'keep_checkpoints',
  'tensorboard',
  'data.microbatch_size',
)


def check(workdir: pathlib.Path, config: config_lib.Config):
  """Checks that `workdir` is free or holds this very run; changes nothing.

  Raises:
    ValueError: the folder holds something else, or a run with other settings.
  """
  if (workdir / 'config.json').exists():
    old = plain.leaves(read_config(workdir))
    for name, new in plain.leaves(config).items():
      free = name in FREE or name.startswith('mesh.')
      if not free and old[name] != new:
        raise ValueError(
          f'{workdir} holds a run with {name}={old[name]!r}, this one has '
          f'{new!r}: choose another --workdir'
        )
  elif workdir.exists() and not workdir.is_dir():
    raise ValueError(f'{workdir} is a file: choose a folder as --workdir')
  elif workdir.exists() and any(workdir.iterdir()):
    raise ValueError(
      f'{workdir} is not empty and holds no run: choose another --workdir'
    )


def claim(workdir: pathlib.Path, config: config_lib.Config):
  """Makes `workdir` the folder of this run, once `check` has passed."""
  check(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(plain.to_dict(config), indent=2) + '\n'
  writer.replace(workdir / 'config.json', text)


def read_config(workdir: pathlib.Path) -> config_lib.Config:
  """The settings of the run in `workdir`.

  Raises:
    ValueError: there is none, or it is from another version.
  """
  file = workdir / 'config.json'
  try:
    return plain.from_dict(config_lib.Config, json.loads(file.read_text()))
  except FileNotFoundError:
    raise ValueError(f'{workdir} holds no run: no {file}') from None
  except (ValueError, TypeError) as error:
    raise ValueError(f'{file} is not a readable config: {error}') from None


def restore(
  workdir: pathlib.Path, abstract: step.TrainState
) -> step.TrainState:
  """The newest state of the run in `workdir`.

  Raises:
    ValueError: it has none yet.
  """
  state = None
  if (workdir / 'checkpoints').is_dir():
    with Checkpoints(workdir, None) as checkpoints:
      state = checkpoints.restore(abstract, None)
  if state is None:
    raise ValueError(f'{workdir} has no checkpoint yet: train it first')
  return state


class Checkpoints:
  """The states saved under `workdir`, newest kept."""

  def __init__(self, workdir: pathlib.Path, keep: int | None):
    self._folder = workdir.absolute() / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_):
    self._manager.close()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: step.TrainState, batches: grain.DatasetIterator):
    """Saves under the number of updates done."""
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        # Once: it is the same in every process.
        data=ocp.args.JsonSave(batches.get_state()),
      ),
    )

  def restore(
    self, abstract: step.TrainState, batches: grain.DatasetIterator | None
  ) -> step.TrainState | None:
    """The newest state, or None; moves `batches`, if given, to its position."""
    newest = self.latest_step()
    if newest is None:
      return None
    items = {'state': ocp.args.StandardRestore(abstract)}
    if batches is not None:
      items['data'] = ocp.args.JsonRestore()
    restored = self._manager.restore(newest, args=ocp.args.Composite(**items))
    if batches is not None:
      batches.set_state(restored['data'])
    return step.TrainState(*restored['state'])
