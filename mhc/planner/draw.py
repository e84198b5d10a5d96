"""A planned step as a picture: a bar of its parts."""

import pathlib
from typing import Any

from matplotlib import figure as figure_lib

from mhc.planner import breakdown

# Light to dark and hatched in turn, so that neighbours differ in grey too.
COLORS = (
  *('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00'),
  *('#f0e442', '#999999', '#44aa99', '#882255', '#ddcc77', '#332288'),
)
HATCHES = ('', '///')
SMALLEST = 0.01  # of the step; smaller parts are drawn as one, the last


def save(plan: dict[str, Any], path: str):
  """Draws the seconds of `plan.plan_step` by part.

  Args:
    plan: with a `breakdown`.
    path: of a PNG or PDF file; its folder is made.

  Raises:
    ValueError: the plan has no time, as for GPUs and CPUs.
  """
  if plan['breakdown'] is None:
    raise ValueError(
      f'--draw_step: a plan for {plan["topology"]!r} that '
      f'{"fits" if plan["fits"] else "does not fit"} has no time to draw: give '
      'a TPU slice that it fits'
    )
  total = plan['step_seconds']
  seconds = {k: v['seconds'] for k, v in plan['breakdown'].items()}
  drawn = {k: v for k, v in seconds.items() if v >= SMALLEST * total}
  rest = sum(seconds.values()) - sum(drawn.values())
  drawn[breakdown.OTHER] = drawn.get(breakdown.OTHER, 0.0) + rest
  figure = figure_lib.Figure(figsize=(8, 2.6), layout='constrained')
  axis = figure.subplots()
  left = 0.0
  for number, (name, value) in enumerate(drawn.items()):
    label = f'{name.replace("_", " ")} {value / total:.0%}'
    axis.barh(
      0,
      value,
      left=left,
      color=COLORS[number % len(COLORS)],
      hatch=HATCHES[number % 2],
      edgecolor='white',
      label=label,
    )
    left += value
  low, high = plan['step_seconds_bounds']
  axis.set_title(
    f'{plan["kind"]} on {plan["topology"]}: {total:.3g} s a step, estimated '
    f'({low:.3g} to {high:.3g}); {plan["mfu"]:.1%} of the peak',
    fontsize=10,
  )
  axis.set_xlabel('seconds of a step')
  axis.set_yticks([])
  axis.set_xlim(0, total)
  figure.legend(loc='outside lower center', ncols=4, fontsize=8, frameon=False)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
