"""Commands of the pages exist, with their flags and settings; so do files."""

import ast
import functools
import itertools
import pathlib
import re
import runpy
import shlex

import documents
import pytest

from mhc import config as config_lib
from mhc.config import comparison as comparison_lib
from mhc.config import dicts

ROOT = documents.ROOT
MAINS = (*(ROOT / 'launch').glob('*.py'),)
DEFINED = re.compile(r"DEFINE_\w+\(\s*'(\w+)'")
# What cli.py gives to every main.
SHARED = {'traceback', 'verbosity'}
# Settings have these names in prose, without the groups that they lie in.
SHORT = {
  'connection': 'model.connection',
  'moe': 'model.moe',
}
GROUPS = ('model', 'optimizer', 'data', 'mesh', 'guards', 'panel', *SHORT)
PLACEHOLDER = re.compile(r'\b[A-Z]{2,}\b')


def commands(page):
  """The commands of a page, as words: lines of sh blocks and inline ones."""
  lines = [
    line
    for code in documents.code(page)
    if code.language == 'sh' and not code.is_fragment
    for line in code.text.replace('\\\n', ' ').splitlines()
  ]
  starts = re.compile(r'(python|make|sbatch|pip) |launch/\w+\.(sh|py) ')
  lines += [span for span in documents.spans(page) if starts.match(span)]
  for line in lines:
    words = shlex.split(line, comments=True)
    if words:
      yield words


def flags_by_calls(text: str) -> set[str]:
  """The flags that code defines by `module.define_...()` of other modules."""
  found = set()
  for module, call in re.findall(r'(\w+)\.(define_\w+)\(', text):
    package = re.search(rf'^from (mhc\S*) import {module}$', text, re.M)[1]
    path = ROOT / package.replace('.', '/') / f'{module}.py'
    code = path.read_text()
    body = re.search(
      rf'^def {call}\(.*?\n(.*?)(?=^def |\Z)', code, re.M | re.S
    )[1]
    found |= {*DEFINED.findall(body)}
    imports = re.findall(r'^from mhc.*$', code, re.M)
    found |= flags_by_calls('\n'.join([*imports, body]))
  return found


@functools.cache
def flags_of(main: pathlib.Path) -> set[str]:
  """The flags of a program, read off its source."""
  text = main.read_text()
  if main.suffix != '.py':
    return {*re.findall(r'--([a-z][\w-]*)', text)}
  found = {*DEFINED.findall(text)}
  found |= {*re.findall(r"add_argument\(\s*'--([\w-]+)'", text)}
  found |= flags_by_calls(text)
  return found | SHARED


def default_config(main):
  name = re.search(r"cli\.define_config\('(\w+)", main.read_text())[1]
  return f'configs/{name}.py'


@functools.cache
def config_file(path: str):
  """The dict of a config file, of 'FILE' or 'FILE:ARGUMENT'."""
  file, _, argument = path.partition(':')
  get_config = runpy.run_path(ROOT / file)['get_config']
  return get_config(*[argument] * bool(argument)).to_dict()


def check_settings(path: str, changes: dict[str, str]):
  """Checks that a config file takes these changes, by making the config."""
  values = config_file(path)
  if not changes:
    return  # it was made, and checked, to become a dict
  cls = comparison_lib.Comparison if 'panels' in values else config_lib.Config
  known = dicts.leaves(values)
  for name, text in changes.items():
    assert name in known, f'{path} has no setting {name}'
    try:
      known[name] = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      known[name] = text
  tree = {}
  for name, value in known.items():
    *groups, last = name.split('.')
    place = tree
    for group in groups:
      place = place.setdefault(group, {})
    place[last] = value
  dicts.from_dict(cls, tree)


def check_program(main: pathlib.Path, words: list[str]):
  """Checks the arguments of one of our programs."""
  assert main.exists(), main
  main = main / '__main__.py' if main.is_dir() else main
  known, path, changes = flags_of(main), None, {}
  for number, word in enumerate(words):
    if word == '--':
      rest = words[number + 1 :]
      if rest and not rest[0].startswith('-'):
        check_program(ROOT / rest[0], rest[1:])
      else:
        check_program(ROOT / 'launch' / 'train.py', rest)
      break
    if not word.startswith('--'):
      continue
    name, _, value = word.removeprefix('--').partition('=')
    if name.startswith('config.'):
      if not PLACEHOLDER.search(word):
        changes[name.removeprefix('config.')] = value
    elif name == 'config':
      path = value
    assert name.partition('.')[0] in known, f'{main.name} has no --{name}'
  if 'config' in known and main in MAINS:
    check_settings(path or default_config(main), changes)
  choices = re.search(r'choices=\(([^)]*)\)', main.read_text())
  if choices and words and not words[0].startswith('-'):
    assert f"'{words[0]}'" in choices[1], f'{main.name} {words[0]}'


def check(words: list[str]):
  first, *rest = words
  match first:
    case 'python' | 'python3.12' if rest and rest[0] != '-m':
      check_program(ROOT / rest[0], rest[1:])
    case 'make':
      made = re.findall(r'^([^\s:#]+):', (ROOT / 'Makefile').read_text(), re.M)
      for word in rest:
        assert '=' in word or word in made, f'make {word}'
    case 'pip':
      setup = (ROOT / 'setup.py').read_text()
      for extra in re.findall(r'^\.\[([\w,]+)\]$', '\n'.join(rest), re.M):
        for name in extra.split(','):
          assert f"'{name}': " in setup, extra
    case 'sbatch':
      script = next(word for word in rest if word.startswith('launch/'))
      arguments = rest[rest.index(script) + 1 :]
      main = 'compare.py' if 'compare' in script else 'train.py'
      check_program(ROOT / 'launch' / main, arguments)
    case _ if first.startswith('launch/'):
      check_program(ROOT / first, rest)


@pytest.mark.parametrize('page', documents.PAGES)
def test_commands_exist(page):
  for words in commands(page):
    check(words)


@pytest.mark.parametrize('page', documents.PAGES)
def test_settings_exist(page):
  panel = {f'panel.{n}' for n in comparison_lib.Panel.__dataclass_fields__}
  known = dicts.leaves(config_lib.Config()).keys() | panel
  for span in documents.spans(page):
    if 'safetensors' in span or span.endswith('.py'):
      continue  # files
    if re.fullmatch(rf'({"|".join(GROUPS)})(\.\w+)+(=\S*)?', span):
      name, _, value = span.partition('=')
      first, _, rest = name.partition('.')
      full = f'{SHORT.get(first, first)}.{rest}'
      assert full in known, f'{page}: {span}'
      if value and not full.startswith('panel.'):
        check_settings('configs/tiny.py', {full: value.strip("'")})


@pytest.mark.parametrize('page', documents.PAGES)
def test_files_exist(page):
  folders = ('mhc', 'kernels', 'launch', 'configs', 'tests', 'docs')
  for span in documents.spans(page):
    if re.fullmatch(rf'({"|".join(folders)})/[\w/.,{{}}:-]*', span):
      for name in expanded(span.partition(':')[0]):
        here = (ROOT / page).parent / name
        assert (ROOT / name).exists() or here.exists(), f'{page}: {name}'


def expanded(name):
  """The names of a pattern with braces, as a shell expands it."""
  parts = re.split(r'\{([^}]*)\}', name)
  choices = [
    part.split(',') if number % 2 else [part]
    for number, part in enumerate(parts)
  ]
  return map(''.join, itertools.product(*choices))
