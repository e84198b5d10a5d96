"""Where the seconds of a planned step go.

By part, as `model.parts` names them in the program; they and the exposed
communication add up to the step:

    other       computed under no name
    unknown     made by the compiler, of which no neighbour has a name either

Across the parts, each of which may overlap with another:

    bubble      a pipeline's devices wait for the one that is busy in a tick
    padding     rows of a stage that are no blocks
    recompute   forward passes that are computed a second time
"""

from collections.abc import Mapping
import re
import types
from typing import NamedTuple

from mhc.kernels import chips
from mhc.model import parts
from mhc.planner import cost
from mhc.planner import hlo

OTHER, UNKNOWN = 'other', 'unknown'
# The scopes of a stage; in the second its forward pass is repeated.
FORWARD, BACKWARD = STAGES = 'pipeline_f', 'pipeline_b'
# What a stage does for each of its rows.
BLOCK = (
  parts.ATTENTION,
  parts.DENSE,
  parts.EXPERTS,
  parts.ROWS,
  parts.CONNECTIONS,
)


class Share(NamedTuple):
  """A part of a step, in seconds of one device."""

  seconds: float = 0  # estimated
  flops_seconds: float = 0  # of its products and kernels, at the peak
  hbm_seconds: float = 0  # of its bytes, at the peak

  def plus(self, other: 'Share') -> 'Share':
    return Share(*(a + b for a, b in zip(self, other, strict=True)))


class Breakdown(NamedTuple):
  parts: dict[str, Share]
  bubble_seconds: float
  padding_seconds: float
  recompute_seconds: float


def breakdown(
  costs: cost.Costs,
  chip: chips.Chip,
  useful: Mapping[str, float] = types.MappingProxyType({}),
  padded: float = 0.0,
) -> Breakdown:
  """Sums up a program.

  Args:
    costs: of the program.
    chip: that it is compiled for.
    useful: for the scopes of conditionals, how often a device takes the branch
      on average; `module.frequencies` has how often any device does.
    padded: the fraction of a stage's rows that are padding.
  """
  module = costs.module
  owners = _owners(module)
  found = {name: Share() for name in (*parts.ALL, OTHER, UNKNOWN)}
  bubble = padding = recompute = 0.0
  for leaf in costs.leaves():
    one, times = leaf.cost, leaf.times
    share = Share(
      times * one.middle,
      times * one.flops / chip.flops,
      times * one.hbm_bytes / chip.bandwidth,
    )
    owner = owners[leaf.computation][leaf.instruction.name]
    found[owner] = found[owner].plus(share)
    busy = 1.0
    for scope in leaf.scopes:
      busy *= useful.get(scope, 1.0) / (module.frequencies[scope] or 1.0)
    bubble += (1 - busy) * share.seconds
    if leaf.scopes and leaf.scopes[-1] in STAGES and owner in BLOCK:
      padding += padded * busy * share.seconds
    if _again(_op_name(leaf.instruction), leaf.scopes):
      recompute += share.seconds
  return Breakdown(found, bubble, padding, recompute)


def _again(op_name, scopes):
  """Whether an operation repeats one of the forward pass."""
  if 'rematted_computation' in op_name:
    return True
  return BACKWARD in scopes and 'jvp(' in op_name and 'transpose' not in op_name


def _op_name(instruction):
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return found.group(1) if found else ''


def _owners(module) -> dict[str, dict[str, str]]:
  """The part of each instruction, by computation and name."""
  return {name: _within(module, name) for name in module.computations}


def _within(module, name):
  body = module.computations[name]
  found = {}
  for instruction in body:
    owner = _named(module, instruction)
    if owner is None:  # as what it reads
      owners = (found.get(operand) for operand in instruction.operands)
      owner = next(filter(None, owners), None)
    found[instruction.name] = owner
  for instruction in reversed(body):  # or as what reads it
    for operand in instruction.operands:
      if operand in found and found[operand] is None:
        found[operand] = found[instruction.name]
  return {one: owner or UNKNOWN for one, owner in found.items()}


def _named(module, instruction) -> str | None:
  """By its own name or, of a fusion, that of something inside."""
  if instruction.name.startswith('ragged-dot'):  # libtpu's own kernels
    return parts.EXPERTS
  op_name = _op_name(instruction)
  if '/' in op_name:  # else it is an argument's
    return parts.innermost(op_name) or OTHER
  if instruction.opcode != 'fusion':
    return None
  body = module.computations[hlo.called(instruction, 'calls')]
  return next(filter(None, (_named(module, i) for i in reversed(body))), None)
