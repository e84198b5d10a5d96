"""Bundles of the kernels in a step, each compiled alone for its chip.

The kernels are found in the traced step, with their grids: a kernel takes the
bundles of one grid step, times the grid steps of a core. Dumps of the compiler
must be asked for before it is loaded, so that they are counted in a process of
its own, which traces the step again:

    python -m mhc.planner.kernel_bundles config.json v5p:2x2x1 found.json
"""

from collections.abc import Iterator, Mapping
import json
import math
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax.extend import core as jax_core
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mhc import config as config_lib
from mhc.config import dicts
from mhc.kernels import chips
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.planner import bundles
from mhc.planner import targets
from mhc.training import step as step_lib

# HLO's names of the dtypes that kernels return.
_SHORT = {
  'bfloat16': 'bf16',
  'float16': 'f16',
  'float32': 'f32',
  'float64': 'f64',
  'int8': 's8',
  'int16': 's16',
  'int32': 's32',
  'uint8': 'u8',
  'uint32': 'u32',
  'bool': 'pred',
}


def of_step(
  config: config_lib.Config, topology: str
) -> Mapping[tuple[str, str], float]:
  """Bundles of one core for each kernel of the update, by `cost.kernel_key`.

  Raises:
    RuntimeError: the process that counts them failed, with its last words.
  """
  with tempfile.TemporaryDirectory() as folder:
    given, found = (pathlib.Path(folder, n) for n in ('config', 'found'))
    given.write_text(json.dumps(dicts.to_dict(config)))
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'mhc.planner.kernel_bundles'),
        *(str(given), topology, str(found)),
      ],
      capture_output=True,
      text=True,
      check=False,
    )
    if done.returncode:
      raise RuntimeError(
        f'the schedules of the kernels on {topology} could not be counted: '
        f'{(done.stderr.strip().splitlines() or ["no message"])[-1]}'
      )
    return {tuple(key): number for key, number in json.loads(found.read_text())}


def kernels(jaxpr: Any) -> Iterator[Any]:
  """The equations of a jaxpr that call Pallas kernels, however deep."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      yield equation
      continue
    for inner in jax_core.jaxprs_in_params(equation.params):
      yield from kernels(inner)


def count(
  equation: Any, device: jax.Device, chip: chips.Chip, folder: pathlib.Path
) -> float:
  """Bundles that a core issues for all its steps of a kernel's grid.

  Args:
    equation: from `kernels`.
    device: of the topology, of `chip`.
    folder: of the dumps; emptied.
  """
  mesh = Mesh(np.array([device]), ('one',), axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  outputs = tuple(
    jax.core.ShapedArray(a.shape, a.dtype)  # varying over no mesh
    for a in equation.params['out_avals']
  )
  params = equation.params | {'out_avals': outputs}
  operands = [
    jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=everywhere)
    for v in equation.invars
  ]

  @jax.named_scope(params['name'])  # by which the dump is named
  def alone(*arrays):
    return equation.primitive.bind(*arrays, **params)

  jax.jit(alone).lower(*operands).compile()
  semantics = params['compiler_params'].dimension_semantics or ()
  shared = chip.cores if 'parallel' in semantics else 1
  steps = math.ceil(math.prod(params['grid_mapping'].grid) / shared)
  of_one = bundles.bundles(folder, params['name'], steps)
  bundles.empty(folder)
  return float(of_one * steps)


def key(equation: Any) -> tuple[str, str]:
  """`cost.kernel_key` of the call in the compiled program."""
  shapes = (
    f'{_SHORT[str(aval.dtype)]}[{",".join(map(str, aval.shape))}]'
    for aval in equation.params['out_avals']
  )
  return equation.params['name'], ' '.join(shapes)


def main(given: str, topology: str, found: str):
  folder = bundles.folder()  # before the compiler is loaded
  jax.config.update('jax_platforms', 'cpu')
  values = json.loads(pathlib.Path(given).read_text())
  config = dicts.from_dict(config_lib.Config, values)
  devices = targets.devices(topology)
  mesh = mesh_lib.make_mesh(config.mesh, config.data, devices)
  traced = step_lib.Step(Placement(config, mesh)).trace()
  chip = chips.CHIPS[topology.partition(':')[0]]
  counted = {}
  for equation in kernels(traced.jaxpr.jaxpr):
    name = key(equation)
    if name not in counted:
      counted[name] = count(equation, devices[0], chip, folder)
  folder.rmdir()
  pathlib.Path(found).write_text(json.dumps([*counted.items()]))


if __name__ == '__main__':
  main(*sys.argv[1:])
