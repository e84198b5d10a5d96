"""Makes the notebooks from their sources: `make notebooks`.

A source is a script in src/ in the percent format: `# %%` begins a cell of
code, `# %% [markdown]` one of text, and `# %% install NEED ...` is replaced by
install_cell.py with these requirements. Outputs are never kept.
"""

import pathlib
import re
import sys

import nbformat

HERE = pathlib.Path(__file__).parent
# OWNER/NAME on GitHub, once it is published there: the one place that says so.
# Until then the notebooks have no badge, which would lead nowhere.
REPOSITORY = ''
COLAB = 'https://colab.research.google.com'
# What Colab starts a notebook on; others start on a CPU.
MACHINES = {
  'kernels_on_this_tpu': {
    'accelerator': 'TPU',
    'colab': {'gpuType': 'V5E1', 'provenance': []},
  },
}


def main():
  for source in sources():
    notebook(source).write_text(build(source))


def sources() -> list[pathlib.Path]:
  return sorted((HERE / 'src').glob('*.py'))


def notebook(source: pathlib.Path) -> pathlib.Path:
  return HERE / f'{source.stem}.ipynb'


def build(source: pathlib.Path) -> str:
  """Returns the notebook of a source, as the text of its file."""
  name = source.stem
  _, *parts = re.split(r'^# %%(.*)\n', source.read_text(), flags=re.M)
  cells = []
  for kind, text in zip(parts[::2], parts[1::2], strict=True):
    cell = _cell(kind.strip(), text.strip('\n'))
    cell['id'] = f'{name}-{len(cells)}'.replace('_', '-')
    cells.append(cell)
  if REPOSITORY:
    cells[0]['source'] += f'\n\n{badge(name)}'
  book = nbformat.v4.new_notebook(cells=cells)
  book['metadata'] = {
    'colab': {'provenance': []},
    'kernelspec': {
      'display_name': 'Python 3',
      'language': 'python',
      'name': 'python3',
    },
    'language_info': {'name': 'python'},
    **MACHINES.get(name, {}),
  }
  nbformat.validate(book)
  return nbformat.writes(book) + '\n'


def badge(name: str) -> str:
  link = f'{COLAB}/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb'
  return f'[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})'


def _cell(kind, text):
  if kind == '[markdown]':
    lines = [re.sub('^# ?', '', line) for line in text.splitlines()]
    return nbformat.v4.new_markdown_cell('\n'.join(lines))
  if kind.startswith('install '):
    needs = ', '.join(repr(need) for need in kind.split()[1:])
    text = (HERE / 'install_cell.py').read_text().strip('\n')
    text = text.replace('NEEDS = []', f'NEEDS = [{needs}]')
    hidden = {'cellView': 'form', 'jupyter': {'source_hidden': True}}
    return nbformat.v4.new_code_cell(text, metadata=hidden)
  if kind:
    sys.exit(f'{kind!r} is no kind of cell: leave it out for code')
  return nbformat.v4.new_code_cell(text)


if __name__ == '__main__':
  main()
