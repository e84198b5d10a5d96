"""comparison.json: the panels, as they were declared before training."""

from mhc.config import comparison as comparison_lib
from mhc.runtime import files
from mhc.runtime import paths

COMPARISON = 'comparison.json'


def read(workdir: paths.Path) -> comparison_lib.Comparison | None:
  """Reads what a comparison has declared; None for an unused folder.

  Raises:
    ValueError: the file is damaged; the message names it.
  """
  file = workdir / COMPARISON
  if not file.exists():
    return None
  values = files.read_json(file)
  try:
    return comparison_lib.read(values)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(f'{file} is not a readable comparison: {error}') from None
