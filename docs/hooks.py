"""What the site shows from other places, each where a comment asks for it.

    <!-- include status.md -->               a file of docs/fragments/
    <!-- settings run.py GuardsConfig -->    a table of the settings of a class
    <!-- notebooks -->                       a line for each of notebooks/

Such a comment is invisible where Markdown is read as it is. The notebooks get
entries in the navigation, in the order of ORDER. `make docs` fails for a page
that would load anything from the network.
"""

import ast
import html.parser
import json
import pathlib
import re

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority

ROOT = pathlib.Path(__file__).resolve().parents[1]
FRAGMENTS, CONFIG = ROOT / 'docs' / 'fragments', ROOT / 'mhc' / 'config'
NOTEBOOKS = ROOT / 'notebooks'
# Those of other names follow, by name.
ORDER = ('sinkhorn', 'gains', 'own_model', 'compare', 'kernels_on_this_tpu')
# The package as it is imported, made of links; mkdocs.yml reads it there.
LINKED = 'build/docs'
GALLERY = {'Notebooks': 'notebooks.md'}
COMMENT = re.compile(r'^<!-- (include|settings|notebooks) ?(.*?) -->$', re.M)


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_config(config):
  """Makes the package that is documented, and adds notebooks to `nav`."""
  _link_package(ROOT / LINKED / 'mhc')
  found = [f'notebooks/{path.name}' for path in notebooks()]
  if found:
    jupyter = config.plugins['mkdocs-jupyter'].config
    jupyter['notebook_dirs'] = {'notebooks': str(NOTEBOOKS)}
  for section in config.nav:
    for entries in section.values():
      if found and isinstance(entries, list) and GALLERY in entries:
        place = entries.index(GALLERY)
        entries[place] = {'Notebooks': ['notebooks.md', *found]}
  return config


def on_page_markdown(markdown, **_):
  return COMMENT.sub(_shown, markdown)


def on_post_page(output, **_):
  """Names source files as in the repository; drops what is on other sites.

  That is mkdocs-jupyter's loader of MathJax, in every page, and the pictures
  of badges, for their text.
  """
  for folder in ('kernels', ''):
    output = output.replace(f'{LINKED}/mhc/{folder}', folder or 'mhc/')
  output = re.sub(
    r'<script data-mkdocs-jupyter-mathjax=.*?</script>', '', output, flags=re.S
  )
  return re.sub(
    r'<img(?=[^>]* src="http)[^>]* alt="([^"]*)"[^>]*>', r'\1', output
  )


def on_post_build(config):
  """Raises for what a browser would load from the network."""
  site = pathlib.Path(config.site_dir)
  for page in sorted(site.rglob('*.html')):
    found = loaded_from_network(page.read_text())
    if found:
      raise PluginError(f'{page.relative_to(site)} would load {found[0]}')


def notebooks() -> list[pathlib.Path]:
  """The notebooks, in the order of the navigation."""
  rank = {name: number for number, name in enumerate(ORDER)}
  return sorted(
    NOTEBOOKS.glob('*.ipynb'),
    key=lambda path: (rank.get(path.stem, len(ORDER)), path.stem),
  )


def title_and_summary(notebook: pathlib.Path) -> tuple[str, str]:
  """The heading of a notebook and the first paragraph below it."""
  first = json.loads(notebook.read_text())['cells'][0]
  heading, _, rest = ''.join(first['source']).strip().partition('\n')
  summary = ' '.join(rest.strip().partition('\n\n')[0].split())
  return heading.lstrip('# '), summary


def settings(source: str, name: str) -> list[tuple[str, str, str, str]]:
  """(name, type, default, comment) of each field of a dataclass in a file."""
  tree, lines = ast.parse(source), source.splitlines()
  aliases = {
    node.targets[0].id: node.value
    for node in tree.body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
  }
  (cls,) = (
    node
    for node in tree.body
    if isinstance(node, ast.ClassDef) and node.name == name
  )
  rows = []
  for node in cls.body:
    if isinstance(node, ast.AnnAssign):
      comment, above = [], node.lineno - 2
      while lines[above].strip().startswith('#'):
        comment.insert(0, lines[above].strip().lstrip('# '))
        above -= 1
      hint = node.annotation
      if isinstance(hint, ast.Name):
        hint = aliases.get(hint.id, hint)
      rows.append(
        (
          node.target.id,
          _type(hint),
          ast.unparse(node.value),
          ' '.join(comment),
        )
      )
  return rows


class _Loaded(html.parser.HTMLParser):
  """Collects what a browser loads with a page."""

  def __init__(self):
    super().__init__()
    self.found = []

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    names = {'link': ('href',), 'a': (), 'base': ('href',)}.get(
      tag, ('src', 'srcset', 'data', 'poster')
    )
    if tag == 'link' and attributes.get('rel') in ('canonical', 'next', 'prev'):
      names = ()
    for name in names:
      if re.match(r'\s*(https?:)?//', attributes.get(name) or ''):
        self.found.append(f'<{tag} {name}="{attributes[name]}">')


def loaded_from_network(text: str) -> list[str]:
  """What a browser would load from the network with a page."""
  page = _Loaded()
  page.feed(text)
  styles = ' '.join(re.findall(r'<style.*?</style>', text, re.S))
  scripts = ' '.join(re.findall(r'<script.*?</script>', text, re.S))
  imported = re.findall(
    r'url\(["\']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*', styles
  )
  imported += re.findall(r'https?://[^"\'\s]*', scripts)
  diagrams = ['mermaid, for a diagram'] * ('class="mermaid"' in text)
  return [*page.found, *imported, *diagrams]


def _link_package(folder):
  """The package as it is imported: kernels/ lies in mhc/ as mhc.kernels."""
  folder.mkdir(parents=True, exist_ok=True)
  targets = [*(ROOT / 'mhc').iterdir(), ROOT / 'kernels']
  for link in folder.iterdir():
    link.unlink()
  for target in targets:
    (folder / target.name).symlink_to(target)


def _shown(match):
  what, arguments = match.groups()
  match what:
    case 'include':
      return (FRAGMENTS / arguments).read_text()
    case 'settings':
      file, name = arguments.split()
      return _table(settings((CONFIG / file).read_text(), name))
    case 'notebooks':
      lines = []
      for path in notebooks():
        title, summary = title_and_summary(path)
        lines.append(f'* [{title}](notebooks/{path.name}). {summary}')
      return '\n'.join(lines)


def _table(rows):
  lines = ['| setting | type | default | |', '|---|---|---|---|']
  for name, hint, default, comment in rows:
    lines.append(f'| `{name}` | {hint} | {_default(default)} | {comment} |')
  return '\n'.join(lines)


def _type(hint):
  if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) == 'Literal':
    return ', '.join(f'`{ast.literal_eval(e)}`' for e in _elements(hint.slice))
  return f'`{ast.unparse(hint)}`'


def _elements(node):
  return node.elts if isinstance(node, ast.Tuple) else [node]


def _default(text):
  group = re.search(r'(\w+)Config', text)
  return f'[below](#{group[1].lower()})' if group else f'`{text}`'
