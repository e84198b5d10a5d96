"""A plan as a Markdown table, each figure with its source.

counted    exact, from the config
formula    from the config, of the dominant terms
compiled   by the target's own compiler
estimated  from the compiler's schedule, data sheets' speeds of chip, memory
           and links, and the bytes sent; no program has run. In brackets its
           bounds, see `cost`
"""

from typing import Any


def table(plan: dict[str, Any]) -> str:
  """Formats `plan.plan_step`, with the figures that `plan.overheads` adds."""
  rows = []

  def row(name, value, source):
    rows.append(f'| {name} | {value} | {source} |')

  mesh = ' x '.join(f'{size} {axis}' for axis, size in plan['mesh'].items())
  row('devices', f'{plan["devices"]} ({mesh})', plan['topology'])
  row('parameters', f'{plan["total_params"]:,}', 'counted')
  row('training FLOPs a token', f'{plan["flops_per_token"]:.3g}', 'counted')
  row('tokens a step', f'{plan["tokens_per_step"]:,}', 'config')
  row('microbatches', str(plan['microbatches']), 'config')
  row('bubble of the pipeline', f'{plan["bubble"]:.1%}', 'counted')
  for kind, size in plan['predicted_bytes'].items():
    row(f'activations: {kind}', _size(size), 'formula')
  row('fits', _fits(plan), 'compiled')
  for kind, size in (plan['by_category'] or {}).items():
    source = 'compiled' if kind == 'temporaries' else 'counted'
    row(f'bytes a device: {kind.replace("_", " ")}', _size(size), source)
  row('bytes a device', _size(plan['bytes_per_device']), 'compiled')
  if plan['step_seconds'] is not None:
    _estimated(plan, row)
  row('seconds to compile', f'{plan["compile_seconds"]:.0f}', 'measured here')
  return '\n'.join(['| | | |', '|---|---:|---|', *rows])


def _estimated(plan, row):
  """Rows of what is estimated from the compiler's schedule."""

  def estimate(name, value):
    row(name, value, 'estimated')

  estimate('bytes moved in a device', f'{plan["bytes_moved"]:.3g}')
  for axes, kinds in plan['collectives'].items():
    for kind, total in kinds.items():
      estimate(
        f'{kind} over {axes}',
        f'{total["count"]:,.0f} times, {_size(total["bytes"])}, '
        f'{total["seconds"]:.3g} s, {total["exposed"]:.3g} s exposed',
      )
  seconds = plan['step_seconds']
  for name, part in plan['breakdown'].items():
    if part['seconds']:
      estimate(
        f'seconds: {name.replace("_", " ")}',
        f'{_share(part["seconds"], seconds)}; at the peaks products '
        f'{part["flops_seconds"]:.3g}, memory {part["hbm_seconds"]:.3g}',
      )
  for name in ('bubble', 'padding', 'recompute'):
    estimate(
      f'of these seconds: {name}', _share(plan[f'{name}_seconds'], seconds)
    )
  estimate('connections, over all else', f'{connections_overhead(plan):+.1%}')
  low, high = plan['step_seconds_bounds']
  estimate('seconds a step', f'{seconds:.4g} ({low:.4g} to {high:.4g})')
  estimate('tokens a second', f'{plan["tokens_per_second"]:,.0f}')
  estimate(
    'model FLOPs utilisation',
    f'{plan["mfu"]:.1%} ({plan["mfu_compiler"]:.1%} by the compiler)',
  )
  for name, value in plan.items():
    if name.startswith('overhead_vs_') and value is not None:
      label = _LABELS[name.removeprefix('overhead_vs_')]
      estimate(f'step against {label}', f'{value:+.1%}')


def connections_overhead(plan: dict[str, Any]) -> float:
  """The connections' own seconds over those of the rest of the step."""
  own = plan['breakdown']['connections']['seconds']
  return own / (plan['step_seconds'] - own)


def _share(seconds, of):
  return f'{seconds:.4g} s, {seconds / of:.1%}'


_LABELS = {'residual': 'the plain residual', 'xla': 'no kernels'}


def _fits(plan):
  """Yes or no, and by how much."""
  if plan['hbm_bytes'] is None:
    return 'yes' if plan['fits'] else 'no'
  free = plan['hbm_bytes'] - plan['bytes_per_device']
  if not plan['fits']:
    return (
      f'no: {_size(-free)} too much' if free < 0 else 'no'
    ) + f' for {_size(plan["hbm_bytes"])}'
  part = free / plan['hbm_bytes']
  return f'yes: {_size(free)} of {_size(plan["hbm_bytes"])} free ({part:.0%})'


def _size(value):
  return (
    f'{value / 2**30:.2f} GiB' if value >= 2**30 else f'{value / 2**20:.2f} MiB'
  )
