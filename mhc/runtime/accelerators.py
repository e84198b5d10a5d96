"""The accelerators of this machine, and whether JAX can use them.

JAX trains on the CPU when it cannot start a GPU's plugin, because the plugin is
missing, goes with another version or needs a newer driver, and says so at most
in its log. Nothing here imports JAX: it looks at devices and package versions.
"""

import functools
import glob
from importlib import metadata
import os
import pathlib
import re

GPUS = '/dev/nvidia[0-9]*'
TPUS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
OTHERS = ('/dev/accel/*', '/dev/kfd')
DRIVER = pathlib.Path('/proc/driver/nvidia/version')
# The oldest driver that a release of CUDA runs on, the newest release first.
OLDEST_DRIVERS = {'cuda13': 580, 'cuda12': 525}


def found() -> bool:
  """Whether there may be an accelerator of any kind."""
  return any(map(glob.glob, (GPUS, *TPUS, *OTHERS)))


def tell_if_unused(platform: str | None = None):
  """Prints a line, once a process, on an accelerator that is not used."""
  line = unused(platform)
  if line is not None:
    _print_once(f'note: {line}')


def unused(platform: str | None = None) -> str | None:
  """Says which accelerator is here and not used, why, and what to install.

  Args:
    platform: that JAX runs on, or None as long as it has not looked for devices
      and all that is known is whether the packages fit.

  Returns:
    None if all is well, or the CPU has been asked for.
  """
  asked = os.environ.get('JAX_PLATFORMS', '')
  if platform not in (None, 'cpu'):
    return None
  if gpus := sorted(glob.glob(GPUS)):
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES', '0').strip() in ('', '-1')
    if hidden or not re.search('cuda|gpu|^$', asked):
      return None
    why = _why_no_gpu(platform)
    here = f'an NVIDIA GPU ({gpus[0]})'
    extra = _extra_for_driver()
  else:
    tpus = sorted(path for pattern in TPUS for path in glob.glob(pattern))
    if not tpus or not re.search('tpu|^$', asked) or _version('libtpu'):
      return None
    why, here, extra = 'libtpu is not installed', f'a TPU ({tpus[0]})', 'tpu'
  if why is None:
    return None
  return (
    f'there seems to be {here}, but {why}: JAX uses the CPU. '
    f"pip install -U 'jax[{extra}]=={_version('jax')}', or set "
    'JAX_PLATFORMS=cpu if the CPU is meant'
  )


def _why_no_gpu(platform) -> str | None:
  jaxlib, misfits = _numbers(_version('jaxlib') or ''), []
  for plugin in (f'jax-{cuda}-plugin' for cuda in OLDEST_DRIVERS):
    version = _version(plugin)
    if version is None:
      continue
    if _numbers(version) != jaxlib:
      misfits.append(f'{plugin} {version} does not go with jaxlib {jaxlib}')
    elif platform is None:
      return None
    else:
      driver = _driver() or 'of unknown version'
      return f'{plugin} {version} could not start it (driver {driver})'
  return misfits[0] if misfits else "JAX's plugin for it is not installed"


def _extra_for_driver() -> str:
  """The extra of jax whose CUDA runs on the driver here."""
  driver = _driver() or OLDEST_DRIVERS['cuda12']
  fitting = (cuda for cuda, least in OLDEST_DRIVERS.items() if driver >= least)
  return next(fitting, 'cuda12')


def _driver() -> int | None:
  """The major version of NVIDIA's driver."""
  text = DRIVER.read_text() if DRIVER.exists() else ''
  number = re.search(r'\b(\d{3})\.\d+', text)
  return int(number[1]) if number else None


def _version(package) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _numbers(version) -> str:
  """The part of a version that JAX compares."""
  return re.match(r'[0-9.]*', version)[0].strip('.')


@functools.cache
def _print_once(line):
  # Imported here: the library is told of accelerators without its libraries.
  from mhc.runtime import console

  console.print_line(line)
