"""The Python examples of docs/ run as they stand; test_readme has the README's.

A block below `<!-- fragment: why -->` does not run. The modules that a page
imports have been loaded before (`forked_mains`); its names are its own.
"""

import documents
import pytest

EXAMPLES = {
  page: blocks
  for page in documents.PAGES
  if page.startswith('docs/')
  and (
    blocks := [
      code.text
      for code in documents.code(page)
      if code.language == 'python' and not code.is_fragment
    ]
  )
}


@pytest.mark.parametrize('page', EXAMPLES)
def test_examples_of_a_page_run_one_after_the_other(page, mains, tmp_path):
  script = tmp_path / 'page.py'
  script.write_text('\n'.join(EXAMPLES[page]))
  result = mains[0].run([script])
  assert result.returncode == 0, result.stderr
