"""The pages that readers see, taken apart: prose, code, links, anchors."""

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
# Every page, by its name from the root.
PAGES = {
  str(path.relative_to(ROOT)): path.read_text()
  for path in (
    ROOT / 'README.md',
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'tests' / 'README.md',
    *sorted(DOCS.rglob('*.md')),
  )
}
_FENCE = re.compile(
  r'(?P<mark><!-- fragment[^\n]*-->\n)?'
  r'^```(?P<language>\w*)\n(?P<text>.*?)^```',
  re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r'(?P<picture>!?)\[[^\]]*\]\((?P<target>[^)\s]+)\)')


class Code(NamedTuple):
  """A fenced block; a fragment does not run by itself."""

  language: str
  text: str
  is_fragment: bool


def code(page: str) -> list[Code]:
  """The fenced blocks of a page."""
  return [
    Code(m['language'], m['text'], bool(m['mark']))
    for m in _FENCE.finditer(PAGES[page])
  ]


def prose(page: str) -> str:
  """A page without its fenced blocks."""
  return _FENCE.sub('', PAGES[page])


def spans(page: str) -> list[str]:
  """The inline code of a page, each on one line."""
  found = re.findall(r'(?<!`)`([^`]+)`(?!`)', prose(page))
  return [' '.join(span.split()) for span in found]


def links(page: str) -> list[tuple[bool, str]]:
  """(is a picture, target) of every link that is not to another site."""
  text = re.sub(r'`[^`]+`', '', prose(page))
  found = [(bool(m['picture']), m['target']) for m in _LINK.finditer(text)]
  return [(p, t) for p, t in found if not re.match(r'https?://', t)]


def anchors(page: str) -> set[str]:
  """The anchors of a page's headings that code hosts and the site agree on."""
  found = []
  for heading in re.findall(r'^#+ (.+)$', prose(page), re.MULTILINE):
    words = re.sub(r'[^\w\s-]', '', heading).strip().lower()
    host, site = re.sub(r'\s', '-', words), re.sub(r'[-\s]+', '-', words)
    found.append(host if host == site and words.isascii() else None)
  return {one for one in found if found.count(one) == 1}
