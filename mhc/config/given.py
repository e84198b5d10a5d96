"""What a command line gives to a comparison and what would be lost of it."""

from collections.abc import Iterable, Sequence
import re

from mhc.config import comparison as comparison_lib

# Settings of the base that every panel sets, and the panel's name for them.
PANELS_OWN = {
  'num_steps': 'num_steps',
  'data.batch_size': 'batch_size',
  'optimizer.clip_norm': 'clip_norm',
  'seed': 'seeds',
  'model.connection.kind': 'kinds',
}
AXES = {
  'model.num_blocks': 'num_blocks',
  'optimizer.learning_rate': 'learning_rates',
  'model.moe.router': 'router',
}


def check(
  comparison: comparison_lib.Comparison,
  arguments: Sequence[str],
  panels: Iterable[str] | None = None,
) -> list[str]:
  """Checks that what `arguments` set is used by some panel.

  Args:
    comparison: as made of them.
    arguments: the words of the command line.
    panels: those that are trained; None for all.

  Returns:
    a line for each setting that some panels replace by their own.

  Raises:
    ValueError: a setting of the base that all panels replace, or seeds as one
      number.
  """
  trained = [*(panels or comparison.panels)]
  lines = []
  for name, text in _settings(arguments):
    if re.fullmatch(r'panels\.\w+\.seeds', name) and re.fullmatch(
      r'\s*\d+\s*', text
    ):
      seeds = ', '.join(map(str, range(max(2, min(int(text), 8)))))
      raise ValueError(
        f'--config.{name}={text} would be seed {text.strip()} alone: list the '
        f"seeds, as in --config.{name}='({seeds})'; that one alone is "
        f"'({text.strip()},)'"
      )
    base = name.removeprefix('base.')
    if base == name:
      continue
    own = [p for p in trained if _replaces(comparison.panels[p], base)]
    if not own:
      continue
    instead = _instead(comparison.panels[own[0]], own[0], base)
    if len(own) == len(trained):
      raise ValueError(
        f'--config.{name}={text} would not be used: every panel sets its own; '
        f'give {instead}'
      )
    lines.append(
      f'--config.{name}={text}: not in {", ".join(own)}, which set their own; '
      f'there, give {instead}'
    )
  return lines


def _settings(arguments) -> list[tuple[str, str]]:
  """(name, text) of each --config.NAME=TEXT or --config.NAME TEXT."""
  joined = '\0'.join(('', *arguments, ''))
  return re.findall('\0--?config\\.([^=\0]+)[=\0]([^\0]*)', joined)


def _replaces(panel, name) -> bool:
  axes = [axis for axis, _ in panel.all_axes]
  if panel.tuned_on:
    axes.append('optimizer.learning_rate')
  if panel.router:
    axes.append('model.moe.router')
  of_rung = name.startswith('model.') and not name.startswith(
    comparison_lib.CONNECTION
  )
  return (
    name in PANELS_OWN
    or name in axes
    or name in dict(panel.settings)
    or (comparison_lib.LADDER in axes and of_rung)
  )


def _instead(panel, panel_name, name) -> str:
  field = {**PANELS_OWN, **AXES}.get(name)
  if field is None or (field in AXES.values() and not getattr(panel, field)):
    field = 'settings' if name in dict(panel.settings) else 'axes'
  if name == 'optimizer.learning_rate' and panel.tuned_on:
    panel_name, field = panel.tuned_on, 'learning_rates'
  return f'--config.panels.{panel_name}.{field}'
