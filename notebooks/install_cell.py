# @title Install: does nothing where everything is installed
import glob
import importlib
import importlib.metadata
import os
import subprocess
import sys

from packaging.requirements import Requirement
from traitlets.config import Application

NEEDS = []
# The package, or a wheel, a folder or a URL (git+https://...) of it.
SOURCE = os.environ.get('MHC_SOURCE', 'mhc-jax')
# A library that is loaded must not change, and one that trains must not be old.
LOADED = ('jax', 'jaxlib', 'flax', 'numpy', 'ml_dtypes', 'optax')
ACCELERATORS = {
  'tpu': ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'),
  'cuda12': ('/dev/nvidia[0-9]*',),
}


def version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def is_met(need, deep=True):
  """Whether a requirement is installed, with what it needs itself."""
  found = version(need.name)
  if not found or not need.specifier.contains(found, prereleases=True):
    return False
  for text in importlib.metadata.requires(need.name) or () if deep else ():
    own = Requirement(text)
    extras = ('', *need.extras)
    used = own.marker is None or any(
      own.marker.evaluate({'extra': extra}) for extra in extras
    )
    if used and not is_met(own, deep=False):
      return False
  return True


def accelerator():
  """The extra of the accelerator that is here, None without one."""
  if 'COLAB_TPU_ADDR' in os.environ:
    return 'tpu'
  for extra, files in ACCELERATORS.items():
    if any(map(glob.glob, files)):
      return extra
  return None


def is_ready():
  if not all(is_met(Requirement(need)) for need in NEEDS):
    return False
  if not trains or not extra:
    return True
  others = {'cuda12': ('cuda12', 'cuda13')}.get(extra, (extra,))
  return any(is_met(Requirement(f'jax[{other}]')) for other in others)


def requirement(need):
  """What pip is asked for: ours from SOURCE, with the accelerator's extra."""
  ours, extras = Requirement(need), Requirement(need).extras
  if ours.name != 'mhc-jax':
    return need
  if trains and extra:
    extras = {*extras, extra}
  words = f'[{",".join(sorted(extras))}]' if extras else ''
  return f'mhc-jax{words} @ {SOURCE}' if '://' in SOURCE else SOURCE + words


def pip(*arguments):
  command = [sys.executable, '-m', 'pip', *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(
      f'pip {" ".join(arguments)} failed; MHC_SOURCE={SOURCE} must be where '
      f'the package is\n{done.stderr[-2000:]}'
    )


class Restart(Exception):
  """Ends a run of all cells without a traceback."""

  def _render_traceback_(self):
    return [str(self)]


trains = any('train' in Requirement(need).extras for need in NEEDS)
extra = accelerator()
if not is_ready():
  before = {name: version(name) for name in LOADED if name in sys.modules}
  wanted = [requirement(need) for need in NEEDS]
  if not trains:  # the JAX that is here stays
    wanted += [f'{n}=={version(n)}' for n in LOADED if version(n)]
  print(f'installing {" ".join(wanted)}', flush=True)
  pip('install', '--quiet', *wanted)
  importlib.invalidate_caches()
  stale = [f'jax-cuda12-{part}' for part in ('plugin', 'pjrt')]
  if trains and version(stale[0]) not in (None, version('jaxlib')):
    pip('uninstall', '--quiet', '--yes', *stale)  # jax would not load it
  changed = [n for n, old in before.items() if version(n) != old]
  if changed:
    Application.instance().kernel.do_shutdown(True)
    raise Restart(
      f'{", ".join(changed)} had been loaded and changed, so Python starts '
      'again: run all cells once more, they will go on from here'
    )
