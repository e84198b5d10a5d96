"""Keeps Colab's JAX consistent: installs into a copy of what Colab ships.

    python tests/slow/colab.py --folder=/tmp/colab

Makes an environment with the versions that Colab has, and a wheel of this
repository. Then

* a library notebook is run there, install cell and all: JAX must stay as it is;
* the install cell of a notebook that trains is run as if there were a GPU, and
  a TPU, without downloading: what pip would install must fit together;
* `gains` is run, whose second half trains: it must replace JAX, end the kernel,
  and run through when all cells are run again.

Each time no package of JAX may miss what it needs (`pip check`), nor may JAX
say that it will not use a plugin. Needs the network, PyPI alone.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = '3.13'
# As Colab publishes them; what is not pinned is the newest that fits.
PINS = (
  *('jax==0.7.2', 'jaxlib==0.7.2', 'flax==0.11.2', 'numpy==2.1.3'),
  *('orbax-checkpoint==0.12.4', 'absl-py==1.4.0'),
  *('matplotlib', 'optax', 'pandas', 'tqdm', 'ipykernel', 'nbclient'),
)
# Without the CUDA libraries, which take gigabytes and matter to none of this.
PLUGIN = 'jax-cuda12-plugin==0.7.2'
FAMILY = ('jax', 'jaxlib', 'jax-cuda12-plugin', 'jax-cuda12-pjrt', 'libtpu')

# Runs a notebook in an environment's own kernel; argv: notebook, result. A
# cell that asks for a restart must end the kernel; then all is run again.
RUN = """
import sys, time
import nbclient, nbformat
from jupyter_core.utils import run_sync
for turn in (1, 2):
  book = nbformat.read(sys.argv[1], 4)
  client = nbclient.NotebookClient(book, timeout=900, kernel_name='python3')
  with client.setup_kernel(cleanup_kc=False):
    try:
      for index, cell in enumerate(book.cells):
        client.execute_cell(cell, index)
      nbformat.write(book, sys.argv[2])
      print(f'RESTARTS {turn - 1}')
      break
    except nbclient.exceptions.CellExecutionError as error:
      if error.ename != 'Restart' or turn == 2:
        raise
      print(error.evalue)
      end = time.monotonic() + 20
      while run_sync(client.km.is_alive)() and time.monotonic() < end:
        time.sleep(0.1)
      assert not run_sync(client.km.is_alive)(), 'the kernel did not end'
"""
# Runs the first install cell as if there were an accelerator; argv: notebook,
# the pattern of its device files.
PRETEND = """
import glob, json, sys
found = glob.glob
glob.glob = lambda pattern: (
  [pattern] if pattern.startswith(sys.argv[2]) else found(pattern)
)
cells = json.load(open(sys.argv[1]))['cells']
(cell, *_) = [''.join(c['source']) for c in cells
              if ''.join(c['source']).startswith('# @title Install')]
exec(compile(cell, 'install', 'exec'), {'__name__': '__main__'})
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', help='Keep the environment there.')
  folder = parser.parse_args().folder
  if folder:
    prove(pathlib.Path(folder).resolve())
    return
  with tempfile.TemporaryDirectory() as temporary:
    prove(pathlib.Path(temporary))


def prove(folder: pathlib.Path):
  colab = Environment(folder)
  shipped = colab.versions()
  print('as shipped:', shipped)

  result = colab.run('sinkhorn')
  colab.check('sinkhorn', result)
  assert colab.versions() == shipped, colab.versions()

  for device, plugin in (
    ('/dev/nvidia', 'jax-cuda12-plugin'),
    ('/dev/accel', 'libtpu'),
  ):
    planned = colab.planned('compare', device)
    print(f'with {device}0 pip would install', planned)
    assert planned['jax'] == planned['jaxlib'], planned
    assert plugin in planned, planned
    if plugin != 'libtpu':
      assert planned[plugin] == planned['jaxlib'], planned

  result = colab.run('gains')
  colab.check('gains', result)
  assert 'RESTARTS 1' in result.stdout, result.stdout
  assert colab.versions()['jax'] != shipped['jax']
  print('all is consistent')


class Environment:
  """A virtual environment with what Colab ships, and a wheel of ours."""

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._python = folder, folder / 'venv' / 'bin' / 'python'
    subprocess.run([_python(), '-m', 'venv', folder / 'venv'], check=True)
    self._pip('install', *PINS)
    self._pip('install', '--no-deps', PLUGIN)
    for old in folder.glob('*.whl'):
      old.unlink()
    self._pip('wheel', '--no-deps', '--wheel-dir', folder, ROOT)
    (wheel,) = folder.glob('*.whl')
    unset = ('JAX_PLATFORMS', 'XLA_FLAGS', 'PYTHONPATH')
    self._environment = {k: v for k, v in os.environ.items() if k not in unset}
    self._environment['MHC_SOURCE'] = str(wheel)
    temporary = folder / 'tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    self._environment['TMPDIR'] = str(temporary)
    self._known = self._problems()

  def run(self, name: str) -> subprocess.CompletedProcess:
    notebook = ROOT / 'notebooks' / f'{name}.ipynb'
    return self._call('-c', RUN, notebook, self._folder / f'{name}.ipynb')

  def planned(self, name: str, device: str) -> dict[str, str]:
    """The versions of JAX's packages that there would be with a device."""
    report = self._folder / 'report.json'
    dry = {'PIP_DRY_RUN': '1', 'PIP_REPORT': str(report)}
    notebook = ROOT / 'notebooks' / f'{name}.ipynb'
    self._call('-c', PRETEND, notebook, device, **dry)
    found = self.versions()
    for one in json.loads(report.read_text())['install']:
      found[one['metadata']['name']] = one['metadata']['version']
    return {name: found[name] for name in FAMILY if name in found}

  def versions(self) -> dict[str, str]:
    listed = json.loads(self._pip('list', '--format=json').stdout)
    found = {one['name']: one['version'] for one in listed}
    return {name: found[name] for name in FAMILY if name in found}

  def check(self, name: str, result: subprocess.CompletedProcess):
    found = self.versions()
    plugin = found.get('jax-cuda12-plugin', found['jaxlib'])
    assert found['jax'] == found['jaxlib'] == plugin, found
    assert not self._problems() - self._known, self._problems() - self._known
    printed = result.stdout + result.stderr
    printed += (self._folder / f'{name}.ipynb').read_text()
    assert 'so it will not be used' not in printed, printed
    assert 'WARNING: there is a' not in printed, printed
    print(f'{name}: {found}')

  def _problems(self) -> set[str]:
    """What pip check says about JAX's packages."""
    command = [self._python, '-m', 'pip', 'check']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {line for line in done.stdout.splitlines() if 'jax' in line}

  def _pip(self, *arguments):
    command = [self._python, '-m', 'pip', *arguments]
    return _checked(command, dict(os.environ))

  def _call(self, *arguments, **variables):
    environment = self._environment | variables
    return _checked([self._python, *arguments], environment)


def _checked(command, environment):
  environment['PIP_DISABLE_PIP_VERSION_CHECK'] = '1'
  done = subprocess.run(
    command,
    capture_output=True,
    text=True,
    env=environment,
    # Not a clone, whose mhc/ Python would take for the package.
    cwd=tempfile.gettempdir(),
    check=False,
  )
  if done.returncode:
    sys.exit(f'{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}')
  return done


def _python() -> str:
  """The Python of Colab's version, or this one."""
  found = sorted(pathlib.Path.home().glob(f'.pyenv/versions/{PYTHON}.*'))
  if found:
    return str(found[-1] / 'bin' / 'python')
  for command in (f'python{PYTHON}',):
    if path := shutil.which(command):
      return path
  version = re.match(r'[\d.]+', sys.version)[0]
  print(f'no Python {PYTHON} here: Python {version} stands in for it')
  return sys.executable


if __name__ == '__main__':
  main()
