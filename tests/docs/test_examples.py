"""The Python examples of docs/ run as they stand; test_readme has the README's.

A block below `<!-- fragment: why -->` does not run.
"""

import subprocess
import sys

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
def test_examples_of_a_page_run_one_after_the_other(page):
  result = subprocess.run(
    [sys.executable, '-c', '\n'.join(EXAMPLES[page])],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
