"""A page of paragraphs, tables and figures, as Markdown or as HTML."""

import base64
from html import escape
from typing import Any, NamedTuple

from mhc.runtime import paths

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px;
  margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { padding: .25em .6em; border-bottom: 1px solid #ddd;
  text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; }
table.text th, table.text td { text-align: left; }
.scroll { overflow-x: auto; }
figure { margin: 1.5em 0; } img { max-width: 100%; }
figcaption { color: #555; font-size: 14px; }
"""


class Heading(NamedTuple):
  level: int
  text: str


class Table(NamedTuple):
  header: list[str]
  lines: list[list[str]]
  numeric: bool = True


class Details(NamedTuple):
  """Blocks that are collapsed under their title."""

  title: str
  blocks: list[Any]


class Figure(NamedTuple):
  path: str  # relative to the report
  caption: str


Block = Heading | Table | Details | Figure | str  # str is a paragraph


def markdown(parts: list[Block]) -> str:
  return '\n\n'.join(_markdown_blocks(parts)) + '\n'


def _markdown_blocks(parts) -> list[str]:
  blocks = []
  for part in parts:
    match part:
      case Heading(level, text):
        blocks.append('#' * level + ' ' + _inline(text))
      case Table():
        blocks.append(_markdown_table(part))
      case Details(title, inner):
        blocks += [
          f'<details><summary>{escape(_line(title))}</summary>',
          *_markdown_blocks(inner),
          '</details>',
        ]
      case Figure(path, caption):
        caption = _inline(caption)
        blocks.append(f'![{caption}]({path})\n\n*{caption}*')
      case text:
        blocks.append(_inline(text))
  return blocks


def _line(text: str) -> str:
  return ' '.join(text.split())


def _inline(text: str) -> str:
  """Markdown of one line without HTML or links: names may hold anything."""
  text = escape(_line(text), quote=False)
  return text.replace('](', ']\\(')


def _markdown_table(table: Table) -> str:
  header, lines, numeric = table
  rule = ['---:' if numeric and i else '---' for i in range(len(header))]
  lines = [[_inline(cell).replace('|', '\\|') for cell in x] for x in lines]
  return '\n'.join(
    '| ' + ' | '.join(line) + ' |' for line in [header, rule, *lines]
  )


def html(title: str, parts: list[Block], folder: paths.Path) -> str:
  """Renders a single HTML file that embeds the figures of `folder`."""
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    f'<title>{escape(title)}</title>'
    f'<style>{STYLE}</style></head><body>\n'
    + '\n'.join(_html_blocks(parts, folder))
    + '\n</body></html>\n'
  )


def _html_blocks(parts, folder) -> list[str]:
  blocks = []
  for part in parts:
    match part:
      case Heading(level, text):
        blocks.append(f'<h{level}>{escape(text)}</h{level}>')
      case Table():
        blocks.append(_html_table(part))
      case Details(title, inner):
        blocks.append(
          f'<details><summary>{escape(title)}</summary>'
          + ''.join(_html_blocks(inner, folder))
          + '</details>'
        )
      case Figure(path, caption):
        data = base64.b64encode((folder / path).read_bytes()).decode()
        caption = escape(caption)
        blocks.append(
          f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
          f'<figcaption>{caption}</figcaption></figure>'
        )
      case text:
        blocks.append(f'<p>{_emphasis(escape(text))}</p>')
  return blocks


def _html_table(table: Table) -> str:
  cells = [_cells('th', table.header)]
  cells += [_cells('td', line) for line in table.lines]
  kind = '' if table.numeric else ' class="text"'
  return (
    f'<div class="scroll"><table{kind}>' + '\n'.join(cells) + '</table></div>'
  )


def _cells(tag, values):
  return (
    '<tr>' + ''.join(f'<{tag}>{escape(v)}</{tag}>' for v in values) + '</tr>'
  )


def _emphasis(text):
  """Converts Markdown's **strong** and `code` to HTML."""
  for mark, tag in (('**', 'strong'), ('`', 'code')):
    pieces = text.split(mark)
    text = pieces[0] + ''.join(
      f'<{tag}>{piece}' if i % 2 == 0 else f'</{tag}>{piece}'
      for i, piece in enumerate(pieces[1:])
    )
  return text
