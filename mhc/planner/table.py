"""A plan as a Markdown table, each figure with its source.

counted    exact, from the config
formula    from the config, of the dominant terms
compiled   by the target's own compiler
estimated  from the compiler's schedule, data sheets' speeds of chip, memory
           and links, and the bytes sent; no program has run
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
    row('bytes moved in a device', f'{plan["bytes_moved"]:.3g}', 'estimated')
    for axes, kinds in plan['collectives'].items():
      for kind, total in kinds.items():
        row(
          f'{kind} over {axes}',
          f'{total["count"]:,.0f} times, {_size(total["bytes"])}, '
          f'{total["seconds"]:.3g} s, {total["exposed"]:.3g} s exposed',
          'estimated',
        )
    row('seconds of compute', f'{plan["compute_seconds"]:.4g}', 'estimated')
    exposed = plan['exposed_comm_fraction']
    row('communication exposed', f'{exposed:.1%} of a step', 'estimated')
    row('seconds a step', f'{plan["step_seconds"]:.4g}', 'estimated')
    row('tokens a second', f'{plan["tokens_per_second"]:,.0f}', 'estimated')
    row('model FLOPs utilisation', f'{plan["mfu"]:.1%}', 'estimated')
    for name, value in plan.items():
      if name.startswith('overhead_vs_') and value is not None:
        label = _LABELS[name.removeprefix('overhead_vs_')]
        row(f'step against {label}', f'{value:+.1%}', 'estimated')
  row('seconds to compile', f'{plan["compile_seconds"]:.0f}', 'measured here')
  return '\n'.join(['| | | |', '|---|---:|---|', *rows])


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
