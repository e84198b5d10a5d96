"""Rules of CONTRIBUTING that a machine can check."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A module imports only from groups to its left.
ORDER = (
  (
    'axes',
    'checks',
    'chips',
    'compiler',
    'damage',
    'gpus',
    'transfers',
    'orders',
    'patience',
    'processes',
    'retry',
  ),
  ('interrupts',),
  ('plain', 'schedule'),
  ('config', 'timeline'),
  ('comparison', 'guards'),
  ('layout',),
  ('scaling',),
  ('manifold',),
  ('gains', 'mixing', 'precision'),
  ('recompute',),
  ('attend', 'layers', 'streams'),
  ('attention', 'experts', 'hyper'),
  ('connections', 'exchange'),
  ('moe',),
  ('transformer', 'sizes'),
  ('hlo', 'sharding', 'torus'),
  ('fsdp', 'memory', 'slots', 'traffic', 'vocabulary'),
  ('pipeline',),
  ('counts',),
  ('optimizer', 'tokenizer'),
  ('loss',),
  ('step',),
  ('plan', 'plan_table'),
  ('suggest',),
  ('documents', 'fingerprint', 'writer'),
  ('folder',),
  ('shards',),
  ('tokens',),
  ('data', 'prepare'),
  ('checkpoint',),
  ('evaluate', 'faults', 'interop', 'sample'),
  ('loop',),
  ('train',),
  ('events', 'page'),
  ('compare', 'results', 'torture'),
  ('claims', 'plots'),
  ('report',),
)
RANK = {name: i for i, group in enumerate(ORDER) for name in group}
MODULES = sorted(ROOT.glob('mhc/*.py'))
KERNELS = sorted(ROOT.glob('kernels/**/*.py'))
SOURCES = [*MODULES, *KERNELS, *sorted(ROOT.glob('launch/*.py'))]


def imports(path):
  """(module, names) of every import."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((alias.name, ()) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module, tuple(alias.name for alias in node.names)


def name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', MODULES, ids=name)
def test_imports_point_one_way(path):
  if path.stem == '__init__':
    return
  for module, names in imports(path):
    assert not module.startswith(('ml_collections', 'absl'))
    if module == 'mhc':
      for imported in names:
        assert RANK[imported] < RANK[path.stem], f'{path.stem} <- {imported}'


@pytest.mark.parametrize('path', KERNELS, ids=name)
def test_kernels_know_only_the_mathematics(path):
  """What plain JAX computes by, dtypes, and what chips there are."""
  if path.stem == 'measure':  # a tool around them
    return
  for module, names in imports(path):
    if module == 'mhc':
      assert set(names) <= {
        'axes',
        'chips',
        'manifold',
        'precision',
        'scaling',
        'streams',
      }


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_files_are_short_and_say_what_they_are(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 420
  if path.stem != '__init__':
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_parameters_are_plain_pytrees(path):
  text = path.read_text()
  assert not re.search(r'nnx\.(jit|grad|scan|vmap|Optimizer|sow)\b', text)


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_axes_of_the_mesh_are_checked(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.keyword) and node.arg == 'check_vma':
      assert not isinstance(node.value, ast.Constant)


def test_every_module_has_a_test():
  tests = '\n'.join(p.read_text() for p in ROOT.glob('tests/test_*.py'))
  for path in MODULES:
    if path.stem not in (
      '__init__',
      'checks',
      'hyper',
      'layers',
      'plots',
      'scaling',  # by test_manifold, which it is the inside of
    ):
      assert re.search(rf'\bimport {path.stem}\b', tests), path.stem
