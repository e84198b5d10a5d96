"""Links and pictures of the pages lead somewhere; the site has all pages."""

import documents
import pytest
import yaml

SITE = yaml.safe_load((documents.ROOT / 'mkdocs.yml').read_text())


def entries(nav):
  """The files that a navigation names."""
  for entry in nav:
    if isinstance(entry, str):
      yield entry
    elif isinstance(entry, list):
      yield from entries(entry)
    else:
      yield from entries(entry.values())


@pytest.mark.parametrize('page', documents.PAGES)
def test_links_and_pictures_exist(page):
  folder = (documents.ROOT / page).parent
  for is_picture, target in documents.links(page):
    file, _, anchor = target.partition('#')
    path = (folder / file).resolve() if file else documents.ROOT / page
    assert path.exists(), f'{page} -> {target}'
    name = str(path.relative_to(documents.ROOT))
    if page.startswith('docs/'):
      # Beyond the folder the site has nothing.
      assert name.startswith('docs/'), f'{page} -> {target}'
    if anchor:
      assert anchor in documents.anchors(name), f'{page} -> {target}'
    if is_picture:
      assert path.suffix in ('.png', '.svg'), f'{page} -> {target}'


def test_the_navigation_has_every_page_once():
  on_disk = {
    name.removeprefix('docs/')
    for name in documents.PAGES
    if name.startswith('docs/') and '/fragments/' not in name
  }
  listed = [*entries(SITE['nav'])]
  assert sorted(listed) == sorted(on_disk)


def test_the_site_loads_nothing_from_elsewhere():
  assert SITE['theme']['font'] is False
  for name in ('extra_css', 'extra_javascript'):
    assert not any('//' in entry for entry in SITE.get(name, ()))
  # Diagrams would be drawn by a script from the network.
  for page in documents.PAGES:
    assert 'mermaid' not in {code.language for code in documents.code(page)}


def test_comments_that_the_site_fills_in_are_known():
  for page, text in documents.PAGES.items():
    if page.startswith('docs/'):
      for line in text.splitlines():
        if line.startswith('<!-- '):
          what, argument = line.split()[1:3]
          assert what in ('include', 'settings', 'notebooks', 'fragment:')
          if what == 'include':
            assert (documents.DOCS / 'fragments' / argument).exists()
          if what == 'settings':
            file = documents.ROOT / 'mhc' / 'config' / argument
            assert f'\nclass {line.split()[3]}:' in file.read_text(), line
