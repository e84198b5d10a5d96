"""How far it is from the update to the streams, and from a connection down."""

import functools
import pathlib
import sys
import traceback

import jax
import jax.numpy as jnp
import pytest

import mhc
from mhc import config
from mhc.kernels.xla import streams
from mhc.parallel import mesh as mesh_lib
from mhc.parallel.placement import Placement
from mhc.training import step

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS, PACKAGE = str(ROOT / 'kernels'), str(ROOT / 'mhc')


@pytest.mark.usefixtures('optax_promotion')
def test_the_first_read_of_the_streams_is_near(monkeypatch):
  """Frames of this repository, from `train_step` to `streams.read`."""
  found = []
  real = streams.read

  def read(*arguments):
    stack = traceback.extract_stack()[:-1]
    ours = [f for f in stack if f.filename.startswith((KERNELS, PACKAGE))]
    found.append([frame.name for frame in ours] + ['read'])
    return real(*arguments)

  monkeypatch.setattr(streams, 'read', read)
  settings = config.Config(mesh=config.MeshConfig(num_devices=4))
  mesh = mesh_lib.make_mesh(settings.mesh, settings.data)
  compiled = step.Step(Placement(settings, mesh))
  jax.make_jaxpr(functools.partial(step.train_step, compiled.placement))(
    compiled.abstract_state, compiled.abstract_tokens, compiled.abstract_inputs
  )
  frames = found[0]
  assert frames[0] == 'train_step'
  # Two of them are for Explicit meshes: explicit.call and what it runs.
  assert len(frames) <= 16, frames


def test_a_connection_asks_the_kernels_twice():
  """For what the sub-layer reads and for the projection, and not to and fro.

  What every file may use, axes and dtypes, is not counted.
  """
  connection, x = mhc.MHC(64, 4, 0), jnp.ones((2, 8, 4, 64))
  crossings, sides = [], []

  def side(frame):
    name = frame.f_code.co_filename
    if name.startswith(KERNELS):
      return 'kernels'
    if name.startswith(PACKAGE) and not name.endswith(
      ('axes.py', 'precision.py')
    ):
      return 'mhc'
    return None

  def watch(frame, event, _):
    here = side(frame)
    if event != 'call' or here is None:
      return
    above = frame.f_back
    while above is not None and side(above) is None:
      above = above.f_back
    sides.append(here)
    if above is not None and side(above) != here:
      crossings.append(frame.f_code.co_name)

  sys.setprofile(watch)
  try:
    connection.pre(x)
  finally:
    sys.setprofile(None)
  assert {*sides} == {'mhc', 'kernels'}
  assert crossings == ['pre', 'sinkhorn']
