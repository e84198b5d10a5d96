"""Rules of CONTRIBUTING that a machine can check."""

import ast
import collections
import graphlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A package imports only from itself and from its left.
LINE = (
  *('axes', 'precision', 'config', 'runtime', 'kernels', 'library'),
  *('model', 'pipeline', 'data', 'parallel', 'interop', 'training'),
  *('evaluation', 'planner', 'experiments', 'configs', 'launch'),
)
MODULES = sorted(ROOT.glob('mhc/**/*.py'))
KERNELS = sorted(ROOT.glob('kernels/**/*.py'))
CONFIGS = sorted(ROOT.glob('configs/*.py'))
MAINS = sorted(ROOT.glob('launch/*.py'))
SOURCES = [*MODULES, *KERNELS, *CONFIGS, *MAINS]


def name(path):
  return str(path.relative_to(ROOT))


def dotted(path):
  """The name that a file is imported by."""
  first, *rest = path.relative_to(ROOT).with_suffix('').parts
  folder = 'mhc' if first == 'mhc' else f'mhc.{first}'
  return '.'.join((folder, *rest)).removesuffix('.__init__')


def package(module):
  """Where a module stands in the line."""
  _, *rest = module.split('.')
  return rest[0] if rest and rest[0] in LINE else 'library'


BY_NAME = {dotted(path): path for path in SOURCES}


def ours(path):
  """The modules of this repository that a file imports at its top."""
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'mhc':
      for alias in node.names:
        full = f'{node.module}.{alias.name}'
        yield full if full in BY_NAME else node.module


def nested(tree):
  """Functions and lambdas inside of functions."""
  functions = (ast.FunctionDef, ast.Lambda)
  for outer in ast.walk(tree):
    if isinstance(outer, ast.FunctionDef):
      for inner in ast.walk(outer):
        if inner is not outer and isinstance(inner, functions):
          yield inner


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_packages_import_from_their_left(path):
  here = LINE.index(package(dotted(path)))
  for module in ours(path):
    if dotted(path) == 'mhc':
      continue  # the front of the library
    assert LINE.index(package(module)) <= here, f'{name(path)} <- {module}'


@pytest.mark.parametrize('path', CONFIGS, ids=name)
def test_config_files_need_settings_alone(path):
  assert {package(module) for module in ours(path)} <= {'config'}


def test_no_file_imports_itself_in_a_circle():
  graph = {module: {*ours(path)} for module, path in BY_NAME.items()}
  for module in ('mhc', 'mhc.kernels'):  # the fronts of what they hold
    graph[module] = set()
  graphlib.TopologicalSorter(graph).prepare()


def test_the_first_look_is_short():
  files = [path for path in ROOT.glob('mhc/*') if path.suffix == '.py']
  folders = [path for path in ROOT.glob('mhc/*/') if path.stem != '__pycache__']
  assert len(files) <= 16  # the library
  assert len(files) + len(folders) <= 27


def test_only_the_command_line_needs_its_libraries():
  for path in (*MODULES, *KERNELS):
    found = re.findall(r'^(?:from|import) (\w+)', path.read_text(), re.M)
    assert path.stem == 'cli' or 'ml_collections' not in found, name(path)


def test_the_library_stands_alone():
  """`import mhc` loads what flax.nnx does, and little of its own."""
  code = (
    'import sys, json, flax.nnx; before = set(sys.modules); import mhc; '
    'print(json.dumps(sorted(set(sys.modules) - before)))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  new = json.loads(result.stdout)
  roots = collections.Counter(module.split('.')[0] for module in new)
  heavy = ('optax', 'orbax', 'grain', 'matplotlib', 'triton', 'ml_collections')
  assert not {*heavy} & {*roots}
  assert not [module for module in new if 'pallas' in module]
  packages = {package(m) for m in new if m.split('.')[0] == 'mhc'}
  assert packages == {'axes', 'precision', 'kernels', 'library'}


def test_a_results_file_is_read_without_the_trainer():
  code = (
    'import sys; from mhc.experiments import results; '
    'print(*(m for m in sys.modules if m.split(".")[0] in '
    '("jax", "orbax", "grain", "flax", "optax", "matplotlib")))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  # Of JAX what `import mhc` itself needs.
  assert not re.search(r'\b(orbax|grain)\.', result.stdout)


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_files_are_short_and_say_what_they_are(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 420
  tree = ast.parse(text)
  if path.stem != '__init__':
    assert ast.get_docstring(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
      assert not (ast.get_docstring(node) or '').startswith('Of ')
    if isinstance(node, ast.FunctionDef) and path not in [*KERNELS, *CONFIGS]:
      assert node.end_lineno - node.lineno < 80, node.name


def test_the_step_reads_from_top_to_bottom():
  """Few functions stand inside of others on the way of a batch."""
  way = ('training/step', 'pipeline/executor', 'pipeline/ticks')
  way += tuple(f'parallel/{p.stem}' for p in ROOT.glob('mhc/parallel/*.py'))
  skip = ('mesh', 'memory', 'partition', 'fsdp', '__init__', 'vocab_parallel')
  paths = [ROOT / 'mhc' / f'{one}.py' for one in way]
  number = sum(
    len([*nested(ast.parse(path.read_text()))])
    for path in paths
    if path.stem not in skip
  )
  assert number <= 15


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_parameters_are_plain_pytrees(path):
  text = path.read_text()
  assert not re.search(r'nnx\.(jit|grad|scan|vmap|Optimizer|sow)\b', text)


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_axes_of_the_mesh_are_checked(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.keyword) and node.arg == 'check_vma':
      assert not isinstance(node.value, ast.Constant)


@pytest.mark.parametrize('path', SOURCES, ids=name)
def test_versions_of_jax_differ_in_one_file(path):
  renamed = r'\.mat\b|\.vma\b|pcast|pvary|manual_axis_type|jax.*__version_info'
  assert path.stem == 'axes' or not re.search(renamed, path.read_text())


def test_every_module_has_a_test():
  """By name; what is inside of another is tested with that."""
  used = set()
  for path in ROOT.glob('tests/**/*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module:
        used |= {node.module, *(f'{node.module}.{a.name}' for a in node.names)}
  inside = (
    *('config.attention', 'config.checks', 'config.model', 'config.run'),
    *('data.batches', 'interop.body', 'interop.huggingface.folder'),
    *('interop.huggingface.modeling_mhc', 'runtime.config_file'),
    *('experiments.plots', 'experiments.sections', 'experiments.tables'),
    'interop.deepseek',
    *('connections.hc', 'connections.mapped', 'connections.mhc'),
    *('connections.residual', 'connections.single_pass'),
    *('interop.safetensors', 'model.layers', 'parallel.loss'),
    *('parallel.pipelined', 'parallel.replicated', 'runtime.console'),
    *('observation', 'optimizer', 'sublayer', 'upcycling'),  # `import mhc`
    *('training.checkpoint_record', 'planner.table', 'pipeline.executor'),
    *('pipeline.keeping', 'evaluation.decoding'),
  )
  for path in MODULES:
    module = dotted(path)
    if path.stem != '__init__' and module.removeprefix('mhc.') not in inside:
      assert module in used, module


def test_nothing_that_is_read_is_executed():
  """No pickles, no eval, no shell: files of others are data."""
  forbidden = {
    *('eval', 'exec', 'compile', 'pickle', 'marshal', 'shelve', 'system'),
    *('popen', 'allow_pickle', 'shell', 'trust_remote_code', 'load_module'),
  }
  own = {'compile'}  # of JAX's lowered programs and of `re`
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      match node:
        case ast.Call(func=ast.Name(id=word)):
          found = {word} & forbidden
        case ast.Call(func=ast.Attribute(attr=word)):
          found = {word} & (forbidden - own)
        case ast.Import(names=names):
          found = {alias.name for alias in names} & forbidden
        case ast.keyword(arg=word, value=value):
          is_false = isinstance(value, ast.Constant) and not value.value
          found = {word} & forbidden if not is_false else set()
        case _:
          found = set()
      assert not found, f'{name(path)}, line {node.lineno}: {found}'
