"""A copy of a run's scalars for Weights & Biases.

Whether it is sent is decided by W&B's own variables: WANDB_MODE=offline keeps
it in the run's folder (`wandb sync` sends it later), WANDB_MODE=disabled drops
it. A run that goes on continues the same run there, by its id in wandb.json.
W&B takes each step once: what a rollback trains again is not sent again.
"""

from collections.abc import Mapping
import json
import uuid

from mhc import config as config_lib
from mhc.config import dicts
from mhc.runtime import console
from mhc.runtime import files
from mhc.runtime import paths
from mhc.runtime import shadow

ID, FOLDER = 'wandb.json', 'wandb'


class WandB:
  """Scalars by step; what cannot be written is said once, and left out."""

  def __init__(self, config: config_lib.Config, workdir: paths.Path):
    import wandb  # an extra, off by default, and slow to import

    self._file, self._reported = workdir / ID, False
    self._folder = workdir / FOLDER
    if not self._file.exists():
      known = {'id': uuid.uuid4().hex, 'project': config.wandb}
      files.replace(self._file, json.dumps(known) + '\n')
    self._run = self._try(
      lambda: wandb.init(
        project=config.wandb,
        id=files.read_json(self._file)['id'],
        name=workdir.name,
        dir=str(shadow.of_folder(self._folder).parent),
        config=files.jsonable(dicts.to_dict(config)),
        resume='allow',
        settings=wandb.Settings(console='off', silent=True),
      )
    )

  def write(self, step: int, values: Mapping[str, float]):
    if self._run is not None:
      self._try(lambda: self._run.log(dict(values), step=step))

  def save(self):
    """Brings what is kept offline to the bucket."""
    shadow.upload(self._folder)

  def close(self):
    if self._run is not None:
      self._try(self._run.finish)
    self.save()

  def _try(self, action):
    try:
      return action()
    except Exception as error:  # of a service: of any class
      if not self._reported:
        message = ' '.join(str(error).split())[:200]
        console.print_line(f'NOT WRITTEN: Weights & Biases: {message}')
      self._reported = True
      return None


def check():
  """Raises ValueError if the package is not there, before any work."""
  try:
    import wandb  # noqa: F401
  except ImportError:
    raise ValueError(
      "the setting wandb needs its package: pip install 'mhc-jax[wandb]'"
    ) from None
