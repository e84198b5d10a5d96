"""Eight CPU devices, strict promotion and runtime shape checks."""

import gc
import importlib.metadata
import os

import quick_compilation

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ |= quick_compilation.LOCATIONS
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  # Two test processes share the machine: one thread each.
  '--xla_cpu_multi_thread_eigen=false '
) + quick_compilation.FLAGS
if not importlib.metadata.version('jaxlib').startswith('0.7.'):
  # Eight devices on a busy core may be late for each other. The oldest jaxlib
  # of `make versions` ends at flags that it does not know.
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_collective_call_warn_stuck_timeout_seconds=120'
    ' --xla_cpu_collective_call_terminate_timeout_seconds=240'
  )

# The GPU kernels run in Triton's interpreter; before anything imports triton.
os.environ['TRITON_INTERPRET'] = '1'

import pathlib
import re
import signal
import subprocess
import sys
import uuid

import beartype.claw
import bucket_server
import float64
import forked_mains
import jax
from jaxtyping import install_import_hook
import numpy as np
import pytest

float64.set_up()

# Tests send them; `nohup make test` and `make test &` start with one ignored.
for number, handler in (
  (signal.SIGHUP, signal.SIG_DFL),
  (signal.SIGINT, signal.default_int_handler),
):
  if signal.getsignal(number) is signal.SIG_IGN:
    signal.signal(number, handler)

ROOT = pathlib.Path(__file__).resolve().parents[1]

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Settings check themselves, with messages that tests read; Triton compiles
# source, which a hook would change; schedules are made of millions of calls.
UNHOOKED = (
  'mhc.config',
  'mhc.kernels.triton',
  'mhc.pipeline.schedules',
  'mhc.pipeline.table',
  'mhc.pipeline.transfers',
)


def modules() -> dict[str, str]:
  """Every module of ours by its full name, with its source."""
  return {
    '.'.join(
      (package, *path.relative_to(ROOT / folder).with_suffix('').parts)
    ): path.read_text()
    for package, folder in (('mhc', 'mhc'), ('mhc.kernels', 'kernels'))
    for path in sorted((ROOT / folder).rglob('*.py'))
    if path.stem != '__init__'
  }


# Shapes are compared within a call, which costs ten times what types do.
checked = {
  name: 'jaxtyping' in source
  for name, source in modules().items()
  if not name.startswith(UNHOOKED)
}
install_import_hook(
  [name for name, shapes in checked.items() if shapes], 'beartype.beartype'
)
beartype.claw.beartype_packages(
  [name for name, shapes in checked.items() if not shapes],
  conf=beartype.BeartypeConf(
    claw_is_pep526=False,
    hint_overrides=beartype.FrozenDict({jax.Array: object}),
    is_pep484_tower=True,
  ),
)


def pytest_collection_finish():
  """A trace makes many objects, and each look for garbage sees all of ours."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


def pytest_collection_modifyitems(items):
  """Files of a minute or two go first, so that two workers end together."""
  items.sort(key=lambda item: item.get_closest_marker('long') is None)


@pytest.fixture
def optax_promotion():
  """Optax mixes an int32 count with floats, which strictness forbids."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """The path of something to learn."""
  file = tmp_path_factory.mktemp('text') / 'book.txt'
  words = np.random.default_rng(0).choice(['ab ', 'cde ', 'f\n'], 4000)
  file.write_text(''.join(words))
  return str(file)


@pytest.fixture(scope='session')
def object_store():
  """A store of buckets on this machine, see `bucket_server`."""
  with bucket_server.Bucket() as running:
    yield running


@pytest.fixture
def bucket(object_store, monkeypatch, request):
  """A folder of a bucket, this test's own."""
  from mhc.runtime import paths

  for name, value in object_store.settings.items():
    monkeypatch.setenv(name, value)
  name = re.sub(r'\W+', '_', request.node.name)
  return paths.path(f'{bucket_server.URL}/{name}-{uuid.uuid4().hex[:8]}')


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
  """What mains have compiled, for those that compile the same."""
  return tmp_path_factory.getbasetemp() / 'compiled'


@pytest.fixture(scope='session')
def mains(compiled):
  """Runs mains on one CPU device, all imports made; and their environment."""
  environment = os.environ | quick_compilation.environment(compiled)
  with forked_mains.Mains(environment) as mains:
    yield mains, environment


@pytest.fixture
def launch(mains):
  """Runs a main as a user would; one that starts `cold` makes its imports.

  And it alone may have variables of its own.
  """

  def run(
    main, *arguments, cold=False, cwd=None, **variables
  ) -> subprocess.CompletedProcess:
    forked, environment = mains
    command = [ROOT / 'launch' / main, *arguments]
    if not cold:
      assert not variables
      return forked.run(command, cwd)
    return subprocess.run(
      [sys.executable, *command],
      capture_output=True,
      text=True,
      env=environment | variables,
      cwd=cwd,
      check=False,
    )

  return run
