"""What is refused before a chip is asked for; the docs' commands pass."""

import dataclasses
import pathlib
import re
import shlex

import pytest

from mhc.config import presets
from mhc.planner import preflight
from mhc.planner import slices

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = (
  'README.md',
  'docs/pods.md',
  'launch/tpu_pod.sh',
  'launch/slurm.sbatch',
)


@pytest.mark.parametrize(
  ('given', 'topology', 'number'),
  [
    ('v5p-1024', 'v5p:8x8x8', 512),
    ('v5p-8', 'v5p:2x2x1', 4),
    ('v5p-32', 'v5p:2x2x4', 16),
    ('v4-64', 'v4:2x4x4', 32),
    ('v4-4096', 'v4:8x16x16', 2048),
    ('v5litepod-4', 'v5e:2x2', 4),
    ('v5e-32', 'v5e:4x8', 32),
    ('v6e-256', 'v6e:16x16', 256),
    ('v6e-1', 'v6e:1x1', 1),
    ('v7x:8x8x8', 'tpu7x:8x8x8', 1024),
    ('v5p:8x8x12', 'v5p:8x8x12', 768),
    ('h100:8', 'h100:8', 8),
  ],
)
def test_slices_by_any_name(given, topology, number):
  assert slices.topology(given) == topology
  assert slices.num_devices(topology) == number


@pytest.mark.parametrize('name', ['v5p-1023', 'v5p-6', 'v6e-12', 'v5e-0'])
def test_no_slices(name):
  with pytest.raises(ValueError, match=f'{name}: a slice has a power of two'):
    slices.topology(name)


def problems(config, slice_='v5p-1024', workdir=''):
  found = list(preflight.look(config, slice_, workdir))
  return {check.what: check.found for check in found if check.problem}


def paper(**data):
  base = presets.paper('27b', 'mhc')
  given = {'path': '/elsewhere/tokens', **data}
  return dataclasses.replace(base, data=dataclasses.replace(base.data, **given))


def test_a_run_that_can_work(tmp_path):
  assert problems(paper()) == {}
  found = {c.what: c.found for c in preflight.look(paper(), 'v5p-1024', '')}
  assert 'v5p-1024 is v5p:8x8x8, 512 devices' in found['slice']
  assert '1280 rows' in found['mesh']
  assert 'device-hours' in found['time']
  assert 'not on this machine' in found['text']


def test_what_cannot_work_is_named(tmp_path):
  config = paper()
  seven = dataclasses.replace(config.mesh, pipe=7, head='last', keep='inputs')
  wrong = problems(dataclasses.replace(config, mesh=seven))
  assert 'mesh.pipe=7' in wrong['mesh']
  assert 'of the 512 devices' in wrong['mesh']
  assert "Python's standard library" in problems(paper(path=''))['text']
  assert 'mount' in problems(paper(path='s3://bucket/x'))['text']
  assert 'of 32 GiB a device' in problems(config, 'v6e-16')['memory']
  assert 'power of two' in problems(config, 'v5p-1023')['slice']
  assert 'has no sides' in problems(config, 'a-lot'.replace('-', ' '))['slice']
  assert ' free' in problems(config, workdir=str(tmp_path))['checkpoints']
  tokens = tmp_path / 'tokens'
  tokens.mkdir()
  (tokens / 'index.json').write_text('{}')
  assert str(tokens) in problems(paper(path=str(tokens)))['text']
  # A type that is not known is not refused: its slice may be there.
  assert problems(config, 'tpu9-128') == {}


def commands():
  """The runs on pods that the documentation shows: (slice, flags)."""
  for page in PAGES:
    text = (ROOT / page).read_text().replace('\n#', '\n')
    for line in re.sub(r'\\\n\s*', ' ', text).splitlines():
      line = line.lstrip('# ')
      if not re.match(r'(python )?launch/|sbatch ', line):
        continue
      words = shlex.split(line, comments=True)
      if 'launch/preflight.py' in words[:2]:
        yield words[2].partition('=')[2], words[3:]
      elif words[:1] == ['launch/tpu_pod.sh'] and '--' in words:
        named = dict(w[2:].split('=') for w in words[1:] if '=' in w)
        yield named['type'], words[words.index('--') + 1 :]
      elif words[:1] == ['sbatch'] and 'launch/slurm.sbatch' in words:
        yield 'h100:32', words[words.index('launch/slurm.sbatch') + 1 :]


def test_the_commands_of_the_documentation_pass(object_store, mains):
  """With a store that does not have their buckets: the pod's may."""
  found = list(commands())
  assert len(found) >= 5
  forked, _ = mains

  def run(*words):
    command = [ROOT / 'launch/preflight.py', *words]
    return forked.run(command, environment=object_store.settings)

  for slice_, flags in found:
    result = run(f'--topology={slice_}', *flags)
    assert result.returncode == 0, f'{flags}: {result.stdout}{result.stderr}'
  result = run('--topology=v5p-1024', '--config=paper_27b')
  assert result.returncode == 2
  assert 'CANNOT WORK' in result.stdout
